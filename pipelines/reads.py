"""How every reader opens a file of images: regular files only, of a bounded length, and within a time limit.

A file that was an image when it was listed may be a pipe, a device or a terabyte of zeros by the time it is read, and
the network disk below it may no longer answer. The first three are errors before anything is read or waited for. The
last cannot be interrupted from inside a process: `watch` reports it from a thread, and its caller ends the process.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable

from pipelines.platforms import open_to_read

# An uncompressed image of `formats.common.MAX_PIXELS` with four channels of 16 bits.
MAX_BYTES = 712_000_000
LIMIT_S = 120.0  # a slow network disk answers in seconds; one that is gone may keep a reader for ever

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_reads: dict[int, tuple[float, str]] = {}  # by thread: when the read in progress began, and of what


class Timed:
    """A context in which `name` is being read, for `watch`. Costs half a microsecond; not to be nested."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        _reads[threading.get_ident()] = time.monotonic(), self._name

    def __exit__(self, *error: object) -> None:
        del _reads[threading.get_ident()]


def watch(limit_s: float, stuck: Callable[[str], None]) -> threading.Event:
    """Starts a thread that calls `stuck` with one line once a read of this process lasts longer than `limit_s`.

    `stuck` should end the process with `os._exit`, since the reading thread may never return. Setting the event that
    is returned ends the watch.
    """
    ended = threading.Event()
    threading.Thread(target=_watch, args=(limit_s, stuck, ended), name="reads", daemon=True).start()
    return ended


def _watch(limit_s: float, stuck: Callable[[str], None], ended: threading.Event) -> None:
    period_s, lasted_s = min(1.0, limit_s / 10), {}
    while not ended.wait(period_s):
        # Counted in periods, not by the clock, which goes on while a process is suspended.
        lasted_s = {read: lasted_s.get(read, 0.0) + period_s for read in list(_reads.items())}
        for (_, (_, name)), seconds in lasted_s.items():
            if seconds > limit_s:
                stuck(
                    f"reading {name} has taken more than {limit_s:g} s: check that its disk or network mount responds, "
                    f"then start again, with --resume if it was training"
                )
                return


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """(descriptor, status) of a regular file. Raises OSError, without waiting, for a pipe, a socket or a device."""
    descriptor = open_to_read(path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a folder")
            raise OSError(f"it is {kind}, expected a regular file")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, status


def check_length(length: int, most: int = MAX_BYTES) -> None:
    """Raises OSError if a file, or a part of one, is longer than an image may be."""
    if length > most:
        raise OSError(f"it has {length:,} bytes, more than the limit of {most:,}")


def read_file(path: str, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError."""
    with Timed(path):
        descriptor, status = open_regular(path)
        try:
            check_length(status.st_size, most)
            return read_up_to(descriptor, status.st_size)
        finally:
            os.close(descriptor)


def read_part(path: str, offset: int, length: int) -> bytes:
    """`length` bytes of a regular file, from `offset`. Raises OSError, also if the file is too short."""
    check_length(length)
    with Timed(path):
        descriptor, _ = open_regular(path)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = read_up_to(descriptor, length)
        finally:
            os.close(descriptor)
    if len(data) != length:
        raise OSError("the file is too short")
    return data


def read_up_to(descriptor: int, length: int) -> bytes:
    """`length` bytes from the position of an open file, or fewer if it ends before. Raises OSError."""
    parts = [os.read(descriptor, length)]
    while parts[-1] and (length := length - len(parts[-1])):
        parts.append(os.read(descriptor, length))
    return parts[0] if len(parts) == 1 else b"".join(parts)
