"""Atomic replacement of files, and SHA-256 sidecars (`NAME.sha256`).

A file is written under a temporary name in its own folder, flushed to disk and renamed: after any crash, a reader sees
either the old content or the new one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.platforms import sync

_DIGEST = re.compile(r"([0-9a-f]{64}) [ *]\S+")


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of a file, or create it, in one step that survives a crash. Raises OSError."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


@contextmanager
def replacing(path: Path, part: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path to write to; after the block it is flushed to disk and renamed to `path`.

    If the block raises, `path` stays as it was and the temporary file is deleted. `part` is the temporary path where
    several processes may write the same file. Raises OSError.
    """
    part = temporary(path) if part is None else part
    part.unlink(missing_ok=True)  # a leftover of a killed process
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):  # must not hide the error
            part.unlink()
        raise


def temporary(path: Path) -> Path:
    """The temporary name under which a file is written before it is renamed."""
    return path.with_name(path.name + ".tmp")


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
