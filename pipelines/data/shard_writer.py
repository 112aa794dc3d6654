"""Writes a folder of tar archives in WebDataset layout that is either complete or absent."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from pipelines.data.decode import printable
from pipelines.data.decoding import DEFAULT, Decoding
from pipelines.data.record_digests import digest
from pipelines.data.space import telling_space
from pipelines.data.tar_classes import CLASS_NAMES, labels_of
from pipelines.data.tar_shards import inspect_members, list_members
from pipelines.errors import DataError
from pipelines.platforms import lock, open_folder, sync


class ShardWriter:
    """Writes archives 000000.tar, … to a temporary folder; `finish` reads them again, and gives the folder its name.

    A context manager: leaving it without `finish` removes what was written. What a killed process leaves, `PATH.part`,
    is removed by the next one that writes to PATH. Only one process at a time can write to PATH.

    shard_bytes  an archive is closed when it reaches this size
    decoding     with which the images were found to be good

    Raises DataError if another process writes to PATH, and OSError.
    """

    def __init__(self, path: Path, shard_bytes: float, decoding: Decoding = DEFAULT) -> None:
        self._decoding = decoding
        self.path, self._shard_bytes = path.absolute(), shard_bytes
        self._part = self.path.with_name(self.path.name + ".part")
        self._archive: tarfile.TarFile | None = None
        self._paths: list[Path] = []
        self._written: list[tuple[bytes, tuple[int, int], int | None]] = []  # digest, (height, width), label
        self.total_bytes = 0
        _remove_leftover(self._part)
        self._part.mkdir(parents=True)
        self._folder = _locked(self._part)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # must not hide the error
            self._close_archive()
        shutil.rmtree(self._part, ignore_errors=True)
        if self._folder is not None:
            os.close(self._folder)

    @property
    def archives(self) -> int:
        """Their number."""
        return len(self._paths)

    def add(self, extension: str, data: bytes, size: tuple[int, int], label: int | None) -> None:
        """Append an encoded image of (height, width) pixels; `extension` begins with a dot. Raises OSError."""
        with telling_space(self.path, len(data)):
            if self._archive is None:
                self._paths.append(self._part / f"{len(self._paths):06d}.tar")
                self._archive = tarfile.TarFile(self._paths[-1], "w", format=tarfile.USTAR_FORMAT)
            number = len(self._written)
            _add(self._archive, f"{number:08d}{extension}", data)
            if label is not None:
                _add(self._archive, f"{number:08d}.cls", str(label).encode())
            self._written.append((digest(data), size, label))
            if self._archive.offset >= self._shard_bytes:
                self._close_archive()

    def finish(self, class_names: tuple[str, ...]) -> None:
        """Name the classes, read everything again as a reader does, and name the folder.

        Raises DataError if the archives do not hold what was written to them, and OSError.
        """
        assert self._written, "archives without images"
        self._close_archive()
        if class_names:
            text = "".join(f"{name}\n" for name in class_names).encode("utf-8", "surrogateescape")
            (self._part / CLASS_NAMES).write_bytes(text)
        for path in sorted(self._part.iterdir()):
            sync(path)
        self._check(class_names)
        sync(self._part)
        os.replace(self._part, self.path)
        sync(self.path.parent)

    def _check(self, class_names: tuple[str, ...]) -> None:
        archives = [str(path) for path in self._paths]
        members = list_members(archives)
        records, (labels, names) = members.records, labels_of(archives, members.files)
        if len(records.names) != len(self._written):
            raise _not_kept(self.path, f"{len(records.names):,} of {len(self._written):,} images can be read")
        if names != class_names:
            raise _not_kept(self.path, "the names of its classes have line breaks, or are not those of a folder")
        headers = inspect_members(records, self._decoding)
        if headers.bad:
            raise _not_kept(self.path, headers.bad[0][1])
        for i, (expected, size, label) in enumerate(self._written):
            found = (
                digest(records.read(i)),
                tuple(headers.sizes[i].tolist()),
                None if labels is None else int(labels[i]),
            )
            if found != (expected, size, label):
                raise _not_kept(self.path, f"{printable(records.names[i])} is another image or has another class")

    def _close_archive(self) -> None:
        archive, self._archive = self._archive, None
        if archive is not None:
            with telling_space(self.path, tarfile.RECORDSIZE):
                archive.close()
            self.total_bytes += archive.offset


def _not_kept(path: Path, reason: str) -> DataError:
    return DataError(f"{printable(str(path))} was not written: what is read back is not what was written ({reason})")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a member without owner and time, so that archives are reproducible."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    archive.addfile(member, io.BytesIO(data))


def _remove_leftover(part: Path) -> None:
    if part.is_symlink() or part.is_file():
        part.unlink()
    elif part.exists():
        folder = _locked(part)
        try:
            shutil.rmtree(part)
        finally:
            if folder is not None:
                os.close(folder)


def _locked(folder: Path) -> int | None:
    """Descriptor of a folder, locked while it is open. Raises DataError if another process holds the lock."""
    descriptor = open_folder(str(folder))
    if descriptor is not None:
        try:
            lock(descriptor, wait=False)
        except OSError as error:
            os.close(descriptor)
            raise DataError(f"another process is writing {printable(str(folder))}; wait for it to end") from error
    return descriptor
