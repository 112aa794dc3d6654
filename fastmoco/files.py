"""Files that are whole or absent, and files with their SHA-256 beside them in a `.sha256` sidecar.

A file is written under a temporary name in its own folder, flushed to the disk and renamed: whoever reads it, after
whatever crash, sees the old content or the new one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_DIGEST = re.compile(r"([0-9a-f]{64}) [ *]\S+")


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of a file, or create it, in one step that survives a crash. Raises OSError."""
    part = temporary(path)
    try:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def temporary(path: Path) -> Path:
    """The name under which a file is written before it gets its own."""
    return path.with_name(path.name + ".tmp")


def sync(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sidecar(path: Path) -> Path:
    """Where the SHA-256 of a file is recorded."""
    return path.with_name(path.name + ".sha256")


def record_digests(path: Path, digests: Iterable[str]) -> None:
    """Write the sidecar of a file, as `sha256sum` would; more than one hash while the file is being replaced."""
    write_atomically(sidecar(path), "".join(f"{digest}  {path.name}\n" for digest in digests))


def recorded_digests(path: Path) -> list[str]:
    """The hashes in the sidecar of a file; none where it is absent or is not a list of hashes."""
    try:
        with sidecar(path).open("rb") as file:
            lines = file.read(4096).decode("ascii").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    return [match[1] for match in map(_DIGEST.fullmatch, lines) if match]
