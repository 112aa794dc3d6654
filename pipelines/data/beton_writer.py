"""Writes a `.beton` file that is either complete or absent.

The format is described in `data.beton`. FFCV's own DatasetWriter is not used: it hangs if a worker fails on a bad
image, and if killed it leaves a file that looks complete.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np

from pipelines.data.beton import (
    ALLOCATION,
    HASHED_BYTES,
    HEADER,
    JPG,
    NO_LABEL,
    RAW,
    SAMPLE,
    SAMPLES_AT,
    VERSION,
    BetonManifest,
    field_table,
    manifest_path,
)
from pipelines.data.decode import printable
from pipelines.errors import DataError
from pipelines.files import sha256, write_atomically
from pipelines.platforms import lock, sync, write_at

PAGE_BYTES = 2**23  # FFCV's default; larger if an image needs it
MAX_SIDE = 65_535  # the format stores a side in two bytes


class BetonWriter:
    """Writes images to a temporary file; `finish` renames it and then writes the manifest.

    A context manager: leaving it without `finish` removes what was written. A killed process leaves `PATH.partial`,
    which the next conversion to PATH replaces. Only one process at a time can write to PATH.

    capacity     maximum number of images
    largest      maximum bytes of an image
    """

    def __init__(self, path: str, capacity: int, largest: int) -> None:
        self.path = os.path.abspath(path)
        for existing in (self.path, manifest_path(self.path)):
            if os.path.lexists(existing):
                raise DataError(f"{printable(existing)} exists; remove it, or choose another name")
        self._page = max(PAGE_BYTES, 1 << (largest - 1).bit_length())
        if self._page >= 2**32:
            raise DataError(f"an image takes up to {largest:,} bytes; FFCV's pages end at 2 GiB")
        self._rows = np.zeros(capacity, dtype=SAMPLE)
        self._allocations = np.zeros(capacity, dtype=ALLOCATION)
        self._count, self._names = 0, []
        self._partial = self.path + ".partial"
        try:
            descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise DataError(f"cannot write {printable(self._partial)}: {error.strerror}") from error
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            lock(self._file.fileno(), wait=False)
        except OSError as error:
            self._file.close()
            raise DataError(f"another process is writing {printable(self._partial)}; wait for it to end") from error
        self._file.truncate(0)
        self._end = -(-(SAMPLES_AT + capacity * SAMPLE.itemsize) // self._page) * self._page

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            os.unlink(self._partial)
            self._file.close()

    def __len__(self) -> int:
        return self._count

    @property
    def names(self) -> list[str]:
        return self._names

    def add(self, data: bytes | np.ndarray, size: tuple[int, int], label: int | None, name: str) -> None:
        """Append a JPEG (bytes) or pixels (H, W, 3) uint8. Raises DataError for a side above `MAX_SIDE`."""
        height, width = size
        if max(size) > MAX_SIDE:
            raise DataError(f"{printable(name)} is {width}×{height} pixels; a .beton file holds sides up to {MAX_SIDE}")
        raw = isinstance(data, np.ndarray)
        payload = np.ascontiguousarray(data).data.cast("B") if raw else memoryview(data)
        assert len(payload) <= self._page
        if self._end // self._page != (self._end + len(payload) - 1) // self._page:
            self._end = -(-self._end // self._page) * self._page
        i = self._count
        _write(self._file.fileno(), payload, self._end)
        self._rows[i] = (RAW if raw else JPG, width, height, self._end, NO_LABEL if label is None else label)
        self._allocations[i] = (i, self._end, len(payload))
        self._names.append(name)
        self._end += len(payload)
        self._count += 1

    def finish(self, manifest: Callable[[int, str, str], BetonManifest]) -> BetonManifest:
        """Write the tables, fsync, rename, and write the manifest `manifest(bytes, tables_sha256, file_sha256)`."""
        assert self._count, "a .beton file without images"
        descriptor = self._file.fileno()
        header = np.array([(VERSION, 2, self._page, self._count, self._end)], dtype=HEADER)
        front = header.tobytes() + field_table().tobytes() + self._rows[: self._count].tobytes()
        back = self._allocations[: self._count].tobytes()
        _write(descriptor, front, 0)
        _write(descriptor, back, self._end)
        length = self._end + len(back)
        digest = sha256(Path(self._partial)) if length <= HASHED_BYTES else ""
        record = manifest(length, hashlib.sha256(front + back).hexdigest(), digest)
        os.fsync(descriptor)
        os.rename(self._partial, self.path)
        self._file.close()
        sync(Path(self.path).parent)
        write_atomically(Path(manifest_path(self.path)), record.to_json())
        return record


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`: one pwrite may write less, at most 2 GiB."""
    rest = memoryview(data)
    while len(rest):
        written = write_at(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
