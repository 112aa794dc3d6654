"""Writes a `.beton` file that is either complete or absent.

The format is described in `data.beton_format`. FFCV's own DatasetWriter is not used: it hangs if a worker fails on a
bad image, and if killed it leaves a file that looks complete.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from pipelines.data.beton import checked_index
from pipelines.data.beton_format import (
    ALLOCATION,
    HEADER,
    JPG,
    NO_LABEL,
    RAW,
    SAMPLE,
    SAMPLES_AT,
    VERSION,
    field_table,
)
from pipelines.data.beton_manifest import BetonManifest, manifest_path, read_manifest
from pipelines.data.decode import printable
from pipelines.data.record_digests import RecordDigests, digest
from pipelines.data.space import telling_space
from pipelines.errors import DataError
from pipelines.files import write_atomically
from pipelines.platforms import lock, sync, write_at

PAGE_BYTES = 2**23  # FFCV's default; larger if an image needs it
MAX_SIDE = 65_535  # the format stores a side in two bytes


class BetonWriter:
    """Writes images to a temporary file; `finish` reads it again, and then gives it and its manifest their names.

    A context manager: leaving it without `finish` removes what was written. What a killed process leaves,
    `PATH.partial` or a manifest without its file, is replaced by the next conversion to PATH. Only one process at a
    time can write to PATH.

    capacity     maximum number of images
    largest      maximum bytes of an image

    Raises DataError if the file exists, is being written or cannot be created.
    """

    def __init__(self, path: str, capacity: int, largest: int) -> None:
        self.path = os.path.abspath(path)
        self._page = max(PAGE_BYTES, 1 << (largest - 1).bit_length())
        if self._page >= 2**32:
            raise DataError(f"an image takes up to {largest:,} bytes; FFCV's pages end at 2 GiB")
        self._rows = np.zeros(capacity, dtype=SAMPLE)
        self._allocations = np.zeros(capacity, dtype=ALLOCATION)
        self._count, self._names, self._digests = 0, [], []
        self._partial, self._manifest = self.path + ".partial", manifest_path(self.path)
        try:
            self._file = os.fdopen(_create_locked(self._partial), "r+b", buffering=0)
        except _LockedError as error:
            raise DataError(f"another process is writing {printable(self._partial)}; wait for it to end") from error
        except OSError as error:
            raise DataError(f"cannot write {printable(self._partial)}: {error.strerror}") from error
        try:
            self._check_names_are_free()
        except BaseException:
            self._discard()
            raise
        self._end = self._first = -(-(SAMPLES_AT + capacity * SAMPLE.itemsize) // self._page) * self._page

    def _check_names_are_free(self) -> None:
        """Removes a manifest without its file, which a killed process left. Raises DataError."""
        for existing in (self.path, self._manifest):
            if os.path.lexists(existing):
                if existing == self._manifest and not os.path.islink(existing):
                    with suppress(DataError):
                        read_manifest(self.path)
                        os.unlink(existing)
                        continue
                raise DataError(f"{printable(existing)} exists; remove it, or choose another name")

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            self._discard()

    def _discard(self) -> None:
        os.unlink(self._partial)
        self._file.close()

    def __len__(self) -> int:
        return self._count

    @property
    def names(self) -> list[str]:
        return self._names

    def add(self, data: bytes | np.ndarray, size: tuple[int, int], label: int | None, name: str) -> None:
        """Append a JPEG (bytes, `beton.is_whole_jpeg`) or pixels (H, W, 3) uint8.

        Raises DataError for a side above `MAX_SIDE`, and OSError.
        """
        height, width = size
        if max(size) > MAX_SIDE:
            raise DataError(f"{printable(name)} is {width}×{height} pixels; a .beton file holds sides up to {MAX_SIDE}")
        raw = isinstance(data, np.ndarray)
        payload = np.ascontiguousarray(data).data.cast("B") if raw else memoryview(data)
        assert len(payload) <= self._page
        if self._end // self._page != (self._end + len(payload) - 1) // self._page:
            self._end = -(-self._end // self._page) * self._page
        i = self._count
        self._write(payload, self._end)
        self._rows[i] = (RAW if raw else JPG, width, height, self._end, NO_LABEL if label is None else label)
        self._allocations[i] = (i, self._end, len(payload))
        self._names.append(name)
        self._digests.append(digest(payload))
        self._end += len(payload)
        self._count += 1

    def finish(self, manifest: Callable[[int, str, str], BetonManifest]) -> BetonManifest:
        """Write the tables, read everything again as a reader does, and name the file and its manifest.

        manifest  called with (bytes, tables_sha256, image_digests) of the file

        The manifest gets its name first, so that a file under its own name is always complete. Raises DataError if the
        file does not hold what was written to it, and OSError.
        """
        assert self._count, "a .beton file without images"
        header = np.array([(VERSION, 2, self._page, self._count, self._end)], dtype=HEADER)
        front = header.tobytes() + field_table().tobytes() + self._rows[: self._count].tobytes()
        back = self._allocations[: self._count].tobytes()
        self._write(memoryview(front), 0)
        self._write(memoryview(back), self._end)
        length = self._end + len(back)
        record = manifest(length, hashlib.sha256(front + back).hexdigest(), RecordDigests.text(self._digests))
        os.fsync(self._file.fileno())
        checked_index(self._file, self.path, record, every_image=True)
        write_atomically(Path(self._manifest), record.to_json())
        try:
            os.rename(self._partial, self.path)
        except OSError:
            os.unlink(self._manifest)
            raise
        self._file.close()
        sync(Path(self.path).parent)
        return record

    def _write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`: one pwrite may write less, at most 2 GiB."""
        mean = (self._end - self._first) // max(1, self._count)
        with telling_space(Path(self.path), max(len(data), (len(self._rows) - self._count) * mean)):
            while len(data):
                written = write_at(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written


class _LockedError(Exception):
    """Another process holds the lock."""


def _create_locked(path: str) -> int:
    """Descriptor of a new file, locked while it is open. A leftover or a link of that name is removed, never followed.

    Raises _LockedError, and OSError.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileExistsError:
            _remove_leftover(path)
            continue
        try:
            lock(descriptor, wait=False)
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):  # not taken for a leftover meanwhile
                return descriptor
        except OSError as error:
            os.close(descriptor)
            raise _LockedError from error
        os.close(descriptor)


def _remove_leftover(path: str) -> None:
    if os.path.islink(path) or not os.path.isfile(path):
        os.unlink(path)
        return
    with open(path, "r+b") as file:
        try:
            lock(file.fileno(), wait=False)
        except OSError as error:
            raise _LockedError from error
        os.unlink(path)
