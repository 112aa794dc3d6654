"""A real disk that is as small as a test wants, which only the calling thread and those it starts can see."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_NEW_NAMESPACE, _OWN_FOLDER, _PRIVATE_AND_ALL_BELOW = 0x20000, 0x200, (1 << 18) | (1 << 14)


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs at a new folder. Its pages have 4 KiB, so `size_bytes` is rounded up to these.

    It goes when the block ends. Skips the test where mounting is not permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    path.mkdir()
    before, here = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY), Path.cwd()
    try:
        if libc.unshare(_NEW_NAMESPACE) != 0:
            pytest.skip(f"mounting a small disk is not permitted ({os.strerror(ctypes.get_errno())})")
        try:
            assert libc.mount(None, b"/", None, _PRIVATE_AND_ALL_BELOW, None) == 0
            assert libc.mount(b"none", os.fsencode(path), b"tmpfs", 0, f"size={size_bytes}".encode()) == 0
            yield path
        finally:
            assert libc.unshare(_OWN_FOLDER) == 0  # threads that the block started share it, which setns refuses
            assert libc.setns(before, _NEW_NAMESPACE) == 0
            os.chdir(here)
    finally:
        os.close(before)


def fill(disk: Path, leave_bytes: int = 0) -> Path:
    """Fill a disk with one file but for some bytes, in whole pages, and return the file."""
    path = disk / "filler"
    status = os.statvfs(disk)
    path.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - leave_bytes)))
    return path
