"""Freed memory is reused without page faults, or returned to the system."""

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
    # Page faults of allocating and filling 128 MiB, after a few times.
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is specific to glibc")
def test_freed_memory_is_kept_or_returned() -> None:
    # In its own process: after other tests, malloc may have 128 MiB in its free lists.
    process = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    counted, *numbers = process.stdout.split()
    returned, kept, resident_before, resident_after = map(int, numbers)
    assert resident_after < resident_before - 100 * MIB
    if counted == "True":  # some kernels count no page faults
        huge_pages = 64  # the fewest faults for 128 MiB
        assert returned >= huge_pages
        assert kept < huge_pages
