"""Freed memory is found again without a page fault, and given back when asked."""

import platform
import subprocess
import sys

import pytest

MIB = 2**20
SCRIPT = """
import resource
import torch
from benchmarks.measure.resources import resident_bytes
from fastmoco.run.malloc import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():
    # Page faults of 128 MiB that have been asked for, filled and freed a few times before.
    for _ in range(30):
        before = faults()
        torch.empty(2**27, dtype=torch.uint8).fill_(1)
    return faults() - before

assert not keep_freed_memory(False)
print(faults() > 0, use(), end=" ")
assert keep_freed_memory()
print(use(), resident_bytes(), end=" ")
assert not keep_freed_memory(False)
print(resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc's settings are glibc's own")
def test_freed_memory_is_kept_or_given_back() -> None:
    # In a process of its own: in one that has run other tests, malloc may have 128 MiB at hand.
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    counted, *numbers = done.stdout.split()
    given_back, kept, resident_before, resident_after = map(int, numbers)
    assert resident_after < resident_before - 100 * MIB
    if counted == "True":  # some kernels count no page faults
        huge_pages = 64  # the least in which a kernel can hand out 128 MiB
        assert given_back >= huge_pages
        assert kept < huge_pages
