"""Image folders packed as one tar file: unpacked once into a cache folder, completely or not at all."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path

from pipelines.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz")
CACHE = "~/.cache/fastmoco"


def unpacked(data: str | None, cache: str | Path = CACHE) -> str | None:
    """The folder in a tar file, unpacked into `cache/unpacked/NAME-HASH` if needed; other values are returned as is.

    Raises DataError, and removes what was unpacked, for an archive that is truncated or has a member outside that
    folder, a device, or a link to elsewhere (tarfile's `data` filter).
    """
    if data is None or not data.lower().endswith(SUFFIXES):
        return data
    path, parent = Path(data).expanduser(), Path(cache).expanduser() / "unpacked"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        folder = parent / f"{path.name.split('.')[0]}-{digest[:12]}"
        if not folder.is_dir():
            parent.mkdir(parents=True, exist_ok=True)
            _unpack(path, folder)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path} cannot be unpacked into {parent} ({reason}); expected a whole tar file of images and space for "
            f"them: copy it again, or unpack it yourself and name the folder"
        ) from error
    return str(_images_folder(folder))


def _unpack(path: Path, folder: Path) -> None:
    """Unpack into a temporary folder beside `folder`, then rename it."""
    if not hasattr(tarfile, "data_filter"):
        raise DataError(f"unpacking {path} safely needs Python 3.11.4 or newer: unpack it yourself and name the folder")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with tarfile.open(path) as archive:
            archive.extractall(temporary, filter="data")
            _check_end(archive)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():  # otherwise another process was faster
            raise


def _check_end(archive: tarfile.TarFile) -> None:
    """A tar file ends in a block of zeros; tarfile reads one that was cut between two members without an error."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it ends early")
    while archive.fileobj.read(2**20):  # to the checksum of a compressed stream
        pass


def _images_folder(folder: Path) -> Path:
    """The folder itself, or its only subfolder, if the archive was made of one folder."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder
