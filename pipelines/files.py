"""Atomic replacement of files, files to append to, and SHA-256 sidecars (`NAME.sha256`).

A file is written under a temporary name in its own folder, flushed to disk and renamed: after any crash, a reader sees
either the old content or the new one. A symbolic link with either name is replaced, never followed.

Where the disk is full, the OSError says so with the bytes that are needed and those that are free.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipelines import platforms
from pipelines.platforms import sync

_DIGEST = re.compile(r"([0-9a-f]{64}) [ *]\S+")
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota of its own


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Replace the content of a file, or create it, in one step that survives a crash. See `replacing`.

    Text is written as UTF-8, with undecodable bytes of file names as they were. Raises OSError.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with replacing(path, len(data), shared=shared) as part:
        part.write_bytes(data)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], *, shared: bool = False) -> None:
    """`write_atomically` of a CSV file; None is empty. Raises OSError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue(), shared=shared)


@contextmanager
def replacing(path: Path, size_bytes: int = 0, *, shared: bool = False) -> Iterator[Path]:
    """Yield the path of a new, empty file to write to; after the block it is flushed to disk and renamed to `path`.

    size_bytes  what will be written, as far as known: the block is not entered if the disk has less space
    shared      several processes may write this file at the same time; the last one wins

    If the block raises, `path` stays as it was and the new file is deleted. Raises OSError.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp" if shared else path.name + ".tmp")
    try:
        part.unlink(missing_ok=True)  # a leftover of a killed process, or a link
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            _check_free_space(path, size_bytes)
            yield part
            os.chmod(part, mode)  # a library may have put a file in its place that only its owner can read
            sync(part)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):  # must not hide the error
                part.unlink()
            raise
        sync(path.parent)
    except OSError as error:
        if is_full(error):
            raise _full(error, path, size_bytes) from error
        raise


def open_to_append(path: Path) -> BinaryIO:
    """An unbuffered file to read and to append to, created if missing.

    Raises OSError, also if it is a symbolic link or anything but a regular file.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link", str(path))
    return os.fdopen(_regular(platforms.open_to_append(str(path)), path), "a+b", buffering=0)


def open_to_read(path: Path) -> BinaryIO:
    """Open a regular file; whatever else has that name is not waited for. Raises OSError."""
    return os.fdopen(_regular(platforms.open_to_read(str(path)), path), "rb")


def read_file(path: Path) -> bytes:
    """The content of a regular file, opened as by `open_to_read`. Raises OSError."""
    with open_to_read(path) as file:
        return file.read()


def json_object(content: str | bytes) -> dict[str, Any] | None:
    """The object in a JSON text; None if it is damaged or anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json_object(path: Path) -> dict[str, Any] | None:
    """`json_object` of a regular file; None also if there is none or it cannot be read."""
    try:
        return json_object(read_file(path))
    except OSError:
        return None


def absolute(path: str | os.PathLike[str]) -> str:
    """An absolute path, with ~ for the home folder, and links as they are."""
    return os.path.abspath(os.path.expanduser(path))


def is_full(error: OSError) -> bool:
    """Whether a file could not be written because the disk is full, or the user's share of it."""
    return error.errno in _FULL


def _check_free_space(path: Path, size_bytes: int) -> None:
    if size_bytes and shutil.disk_usage(path.parent).free < size_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _full(error: OSError, path: Path, size_bytes: int) -> OSError:
    """The same error with the bytes that are needed, if known, and those that are free."""
    assert error.errno is not None
    free = f"{shutil.disk_usage(path.parent).free:,} bytes are free"
    needed = f"{size_bytes:,} bytes are needed and " if size_bytes else ""
    return OSError(error.errno, f"{os.strerror(error.errno)}: {needed}{free}", str(path))


def _regular(descriptor: int, path: Path) -> int:
    """The descriptor, if it is that of a regular file. Else closes it and raises OSError."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return descriptor


def cache_folder() -> Path:
    """$FASTMOCO_CACHE, or else fastmoco's folder of the user's cache. Raises OSError if the user has no folder."""
    if folder := os.environ.get("FASTMOCO_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmoco"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, str(error)) from error


# ---- SHA-256 ---------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sidecar(path: Path) -> Path:
    """Path of the file that records the SHA-256 of `path`."""
    return path.with_name(path.name + ".sha256")


def record_digests(path: Path, digests: Iterable[str]) -> None:
    """Write the sidecar of a file in `sha256sum`'s format; it has several hashes while the file is being replaced."""
    write_atomically(sidecar(path), "".join(f"{digest}  {path.name}\n" for digest in digests))


def recorded_digests(path: Path) -> list[str]:
    """The hashes in the sidecar of a file; empty if it is missing or is not a list of hashes."""
    try:
        with sidecar(path).open("rb") as file:
            lines = file.read(4096).decode("ascii").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    return [match[1] for match in map(_DIGEST.fullmatch, lines) if match]
