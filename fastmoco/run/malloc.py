"""Host memory that is freed and soon asked for again: kept in the process, or given back to the system."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_NEVER = 2**31 - 1
_KEEP = ((_MMAP_THRESHOLD, _NEVER), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, 2**26))
# Where malloc ends by itself in a process that frees large tensors: it raises its first thresholds up to these.
_GIVE_BACK = ((_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26), (_TOP_PAD, 2**17))
_kept = False


def keep_freed_memory(keep: bool = True) -> bool:
    """Whether glibc's malloc keeps what is freed, for the next step to find. Returns whether it does from here on.

    A training step on a CPU frees and asks for the same hundreds of large tensors again and again. By default malloc
    maps each one of 32 MiB and more anew, and the kernel hands out zeroed pages one by one: 67 MB, an activation of
    ResNet-18 at 32 px and batch 512 in bfloat16, cost 30 ms to allocate and fill, and 3 ms where the pages are still
    there. The price is that the process stays as large as it once was.

    keep=False gives back what is free, and the thresholds that malloc comes to by itself. Without glibc nothing
    happens, and False is returned. See mallopt(3).
    """
    global _kept
    if keep == _kept or platform.libc_ver()[0] != "glibc":
        return _kept
    libc = ctypes.CDLL(None)
    if all(libc.mallopt(option, value) for option, value in (_KEEP if keep else _GIVE_BACK)):
        _kept = keep
    if not keep:
        libc.malloc_trim(0)
    return _kept
