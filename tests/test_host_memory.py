"""Freed memory is found again without a page fault, and given back when asked."""

import platform
import resource
from collections.abc import Iterator

import pytest
import torch

from benchmarks.resources import resident_bytes
from fastmoco import host_memory
from fastmoco.host_memory import keep_freed_memory

MIB = 2**20
HUGE_PAGE = 2 * MIB

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc's settings are glibc's own")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = host_memory._kept
    yield
    keep_freed_memory(before)


def faults_of_a_later_use() -> int:
    """Page faults of 128 MiB that have been asked for, filled and freed a few times before."""
    before = 0
    for _ in range(30):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(128 * MIB, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_later_use_finds_the_pages_of_the_first() -> None:
    assert not keep_freed_memory(False)
    assert faults_of_a_later_use() >= 128 * MIB // HUGE_PAGE
    assert keep_freed_memory()
    assert faults_of_a_later_use() < 128 * MIB // HUGE_PAGE


def test_what_was_kept_is_given_back() -> None:
    keep_freed_memory()
    faults_of_a_later_use()
    kept = resident_bytes()
    keep_freed_memory(False)
    assert resident_bytes() < kept - 100 * MIB
