"""Whether a disk has room for what a conversion writes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipelines.data.index import ImageIndex
from pipelines.data.manifest import file_stats
from pipelines.files import is_full


def stored_bytes(index: ImageIndex) -> np.ndarray:
    """(N,) int64: bytes of every image as it is stored now; 0 for a missing file."""
    if index.paths is not None:
        return np.maximum(0, file_stats(index.paths)[:, 0])
    return index.records.lengths if index.records is not None else pixel_bytes(index)


def pixel_bytes(index: ImageIndex) -> np.ndarray:
    """(N,) int64: bytes of every image as pixels, 3·H·W."""
    return 3 * index.sizes.astype(np.int64).prod(axis=1)


def check_space(path: Path, needed_bytes: int) -> None:
    """Raises OSError if the disk of `path`, in a folder that exists, has less space than `path` will need."""
    if shutil.disk_usage(path.parent).free < needed_bytes:
        raise full_disk(path, needed_bytes)


@contextmanager
def telling_space(path: Path, needed_bytes: int) -> Iterator[None]:
    """Where the block fails because the disk is full, the OSError tells the bytes that it needs at least."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise full_disk(path, needed_bytes) from error
        raise


def full_disk(path: Path, needed_bytes: int) -> OSError:
    """The error of a full disk: how many bytes `path` needs at least, and how many there are."""
    free = shutil.disk_usage(path.parent).free
    reason = f"at least {needed_bytes:,} more bytes are needed and {free:,} are free"
    return OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {reason}", str(path))
