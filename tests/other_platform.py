"""Makes Python on Linux lack what it lacks on macOS or Windows: a `sitecustomize`, for a process and its children.

SIMULATED_PLATFORM  macos or windows
SIMULATED_MEMORY    a folder for what Windows keeps in named memory

Only what this project could notice is removed, and the standard library is imported before: it must work as it does
on Linux.
"""

from __future__ import annotations

import concurrent.futures.process
import ctypes
import mmap
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.heap
import multiprocessing.pool
import multiprocessing.sharedctypes
import multiprocessing.spawn
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from typing import Any

GPU_PACKAGES = ("triton", "nvidia", "ffcv", "pynvml")
OF_LINUX = ("sched_getaffinity", "memfd_create", "posix_fadvise")
OF_UNIX = ("pread", "pwrite", "sysconf", "sysconf_names", "fork", "killpg", "setsid", "getuid", "mkfifo")
UNIX_FLAGS = ("O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW")
UNIX_SIGNALS = ("SIGKILL", "SIGUSR1", "SIGHUP", "SIGALRM", "SIGSTOP", "alarm", "setitimer", "pthread_sigmask")


def remove(module: types.ModuleType, *names: str) -> None:
    for name in names:
        delattr(module, name)


def lack_linux() -> None:
    for name in GPU_PACKAGES:
        sys.modules[name] = None  # type: ignore[assignment]
    remove(os, *OF_LINUX)


def macos() -> None:
    lack_linux()
    sysconf = os.sysconf

    def without_available_pages(name: Any) -> int:
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return sysconf(name)

    os.sysconf = without_available_pages
    os.sysconf_names = {name: n for name, n in os.sysconf_names.items() if name != "SC_AVPHYS_PAGES"}


def windows() -> None:
    import fcntl

    lack_linux()
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None  # type: ignore[assignment]
    shutil._use_fd_functions = False  # pyright: ignore[reportAttributeAccessIssue]
    remove(os, *OF_UNIX, *UNIX_FLAGS)
    remove(signal, *UNIX_SIGNALS)
    remove(multiprocessing.context, "ForkContext", "ForkServerContext")
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    multiprocessing.set_start_method("spawn", force=True)
    real_fsync, real_open = os.fsync, os.open

    def fsync(descriptor: int) -> None:
        real_flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if real_flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real_fsync(descriptor)

    def open_no_folder(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, flags, *arguments, **named)

    def locking(descriptor: int, mode: int, count: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PermissionError(13, "Permission denied") from error

    class Mapping(mmap.mmap):
        def __new__(cls, descriptor: int, length: int, *arguments: Any, tagname: str | None = None, **named: Any):
            if tagname is None:
                return super().__new__(cls, descriptor, length, *arguments, **named)
            with open(os.path.join(os.environ["SIMULATED_MEMORY"], tagname), "a+b") as file:
                file.truncate(length)
                return super().__new__(cls, file.fileno(), length, *arguments, **named)

    def memory_status(pointer: Any) -> None:
        pointer._obj.total_bytes, pointer._obj.free_bytes = 2**33, 2**32

    os.fsync, os.open, mmap.mmap = fsync, open_no_folder, Mapping
    ctypes.windll = types.SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        kernel32=types.SimpleNamespace(GlobalMemoryStatusEx=memory_status)
    )
    msvcrt: Any = types.ModuleType("msvcrt")
    msvcrt.locking, msvcrt.LK_NBLCK = locking, 2
    sys.modules["msvcrt"] = msvcrt


assert concurrent.futures.process
assert subprocess
assert tempfile
{"macos": macos, "windows": windows, "": lambda: None}[os.environ.get("SIMULATED_PLATFORM", "")]()
