"""What differs between Linux, macOS and Windows.

The differences are found by what Python offers, not by the name of the system. Only Linux is tested: the others are
simulated there (tests/test_portability.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import multiprocessing
import os
import platform
import re
import threading
import time
from contextlib import suppress
from multiprocessing.context import BaseContext, SpawnContext
from pathlib import Path

from pipelines.cgroups import cpu_quota

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_BINARY = getattr(os, "O_BINARY", 0)  # of Windows, which otherwise changes line ends
_DO_NOT_WAIT = getattr(os, "O_NONBLOCK", 0)  # for the writer of a pipe
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_LOCKED_BYTE = 2**30  # on Windows, where a locked byte cannot be read: none that a file has
_POLL_S = 0.01

_position = threading.Lock()


# ---- processors and memory -------------------------------------------------------------------------------------------


def usable_cpus() -> int:
    """Number of processors that this process may use: by its affinity, or the quota of its container, rounded up."""
    quota = cpu_quota()
    return affine_cpus() if math.isinf(quota) else max(1, min(affine_cpus(), math.ceil(quota)))


def affine_cpus() -> int:
    """Number of processors that this process may run on, for however short a time."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """Model of the processor, from /proc/cpuinfo; elsewhere its architecture."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.machine()


def free_host_memory_bytes() -> int:
    """Free memory; all memory where the system counts only what it does not use for files (macOS)."""
    if not hasattr(os, "sysconf"):
        return _free_on_windows()
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        with suppress(ValueError, OSError):  # an unknown name
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    raise AssertionError("every Unix tells the size of its memory")


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total_bytes", ctypes.c_uint64),
        ("free_bytes", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _free_on_windows() -> int:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # pyright: ignore[reportAttributeAccessIssue]
    return status.free_bytes


def has_triton() -> bool:
    """Whether Triton is installed: it comes with torch's CUDA builds for Linux only."""
    return importlib.util.find_spec("triton") is not None


# ---- files -----------------------------------------------------------------------------------------------------------


def open_to_read(path: str) -> int:
    """Descriptor of a file, also of a pipe that nothing writes to. Raises OSError."""
    return os.open(path, os.O_RDONLY | _DO_NOT_WAIT | _BINARY)


def open_to_append(path: str) -> int:
    """Descriptor of a file to read and to append to, created if missing. Raises OSError, on a link where possible."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_LINK | _DO_NOT_WAIT | _BINARY
    return os.open(path, flags, 0o666)


def open_folder(path: str) -> int | None:
    """Descriptor of a folder; None on Windows, which opens none. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY) if hasattr(os, "O_DIRECTORY") else None


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes of an open file from `offset`, from any thread. Raises OSError."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Write to an open file at `offset`, and return the number of bytes written. Raises OSError."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def sync(path: str | os.PathLike[str]) -> None:
    """fsync a file or a folder (its list of names). Windows opens no folders, and keeps their lists itself."""
    is_folder = os.path.isdir(path)
    if is_folder and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes only what can be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool, inherited: bool = True) -> None:
    """Lock a file open for writing, until it is closed, against whoever else opens it and locks it.

    inherited  whether a child forked meanwhile holds the lock too. If not, then only other processes are kept out,
               and closing any descriptor of the file unlocks it.

    Nothing is locked on a system that has no locks of files.

    Raises OSError if the file is locked and `wait` is false, or if it cannot be locked.
    """
    if fcntl is not None:
        (fcntl.flock if inherited else fcntl.lockf)(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    try:
        import msvcrt
    except ImportError:  # neither Unix nor Windows: nothing is locked
        return

    while True:
        with _position:
            before = os.lseek(descriptor, 0, os.SEEK_CUR)
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
                return
            except PermissionError:  # it is locked
                if not wait:
                    raise
            finally:
                os.lseek(descriptor, before, os.SEEK_SET)
        time.sleep(_POLL_S)


# ---- processes -------------------------------------------------------------------------------------------------------


def has_fork_server() -> bool:
    """Whether processes can be forked from a clean server, which has imported torch once for all of them."""
    return "forkserver" in multiprocessing.get_all_start_methods()


def clean_context(preload: list[str]) -> BaseContext:
    """Starts processes that inherit no threads: from the fork server with these modules, or else from scratch."""
    if not has_fork_server():
        return SpawnContext()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    return context


# ---- output ----------------------------------------------------------------------------------------------------------


def silence(descriptor: int) -> None:
    """Let what is written to an open descriptor, such as a closed terminal, vanish from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
