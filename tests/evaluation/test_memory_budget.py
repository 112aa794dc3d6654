"""The memory budget of evaluations: what is free, what fits, and what counts as running out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmoco.distributed.launch import RankInfo
from fastmoco.distributed.world import World
from fastmoco.errors import DeviceError
from fastmoco.evaluation import budget
from fastmoco.evaluation.budget import budget_bytes, is_out_of_memory, rows_that_fit, shared_budget_bytes
from fastmoco.evaluation.splits import EvaluationSplit, Subset, fit_to_budget, stratified, subsample
from pipelines import host_memory
from pipelines.data.index import ImageIndex

CPU = torch.device("cpu")


def write(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


def test_the_budget_is_half_of_what_is_free_here() -> None:
    """At least 1 MiB is free, and no machine has an exbibyte."""
    assert 2**20 < budget_bytes(CPU) < 2**60


def test_the_host_counts_caches_that_linux_would_drop(tmp_path: Path) -> None:
    write(tmp_path, {"meminfo": "MemTotal:  100 kB\nMemFree:  3 kB\nMemAvailable:  70 kB\nHugePages_Total: 0\n"})
    assert host_memory.on_host_bytes(str(tmp_path / "meminfo")) == 70 * 1024
    assert host_memory.on_host_bytes(str(tmp_path / "missing")) > 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/\n"}, math.inf),  # no files: the control groups are not mounted
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/step/memory.current": "10\n",
                "sys/fs/cgroup/job/step/memory.stat": "anon 9\ninactive_file 1\n",
                "sys/fs/cgroup/job/memory.max": "1000\n",
                "sys/fs/cgroup/job/memory.current": "800\n",
                "sys/fs/cgroup/job/memory.stat": "anon 500\ninactive_file 300\n",
            },
            500,  # of the parent
        ),
        (
            {
                "proc/self/cgroup": "9:cpu:/a\n4:memory:/a\n0::/\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1000\n",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "900\n",
                "sys/fs/cgroup/memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
            },
            150,
        ),
    ],
    ids=["none", "not-mounted", "v2", "v1"],
)
def test_the_limit_of_a_container(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    assert host_memory.in_container_bytes(write(tmp_path, files)) == expected


@given(
    bank=st.integers(1, 10**7),
    queries=st.integers(1, 10**6),
    row_bytes=st.tuples(st.integers(1, 10**5), st.integers(0, 10**5)),
    limit=st.integers(0, 10**12),
    least=st.integers(1, 1000),
)
def test_rows_that_fit(bank: int, queries: int, row_bytes: tuple[int, int], limit: int, least: int) -> None:
    rows = rows_that_fit(bank, queries, row_bytes, limit, least)
    needed = bank * row_bytes[0] + queries * row_bytes[1]
    if needed <= limit:
        assert rows == (bank, queries)
    elif rows is not None:
        (bank_bytes, query_bytes), (few, few_queries) = row_bytes, rows
        assert min(least, bank) <= few < bank or 1 <= few_queries < queries
        assert few * bank_bytes + few_queries * query_bytes <= limit
        before = (2 * few + 1) * bank_bytes + few_queries * query_bytes
        assert max(before, few * bank_bytes + (2 * few_queries + 1) * query_bytes) > limit


def test_the_same_rows_fit_in_a_little_more_or_less_memory() -> None:
    """1,281,167 images of ImageNet with 2,048 features take 10.5 GB, and 50,000 queries 0.4 GB."""
    sizes = 1_281_167, 50_000, (8192, 8192)
    assert rows_that_fit(*sizes, 11 * 10**9, 1000) == (1_281_167, 50_000)
    assert {rows_that_fit(*sizes, gigabytes * 10**9, 1000) for gigabytes in (6, 7, 8, 10)} == {(640_583, 50_000)}
    assert rows_that_fit(*sizes, 10**6, 1000) is None


def test_a_stratified_sample_has_every_class_and_is_part_of_a_larger_one() -> None:
    labels = np.repeat([0, 1, 2, 4], [600, 300, 99, 1])  # class 3 has no images
    half, quarter = stratified(labels, 500), stratified(labels, 250)
    assert np.bincount(labels[half]).tolist() == [300, 150, 49, 0, 1]
    assert np.bincount(labels[quarter]).tolist() == [150, 75, 24, 0, 1]
    assert set(quarter) < set(half)
    assert (np.diff(half) > 0).all()
    np.testing.assert_array_equal(stratified(labels, 1000), np.arange(1000))


def test_a_sample_of_a_subset_keeps_its_index() -> None:
    index = ImageIndex.from_pixels("a", np.zeros((20, 4, 4, 3), np.uint8))
    subset = Subset(index, np.arange(10, 20))
    assert subsample(subset, 10) is subset
    sample = subsample(subset, 4)
    assert sample.index is index
    assert len(sample) == 4
    assert set(sample.positions) < set(subset.positions)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (DeviceError("cuda has too little free memory for features of 9 images"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_are_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_that_fails() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_ranks_share_the_memory_of_a_machine_and_agree_on_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gathered:
        def wait(self) -> torch.Tensor:
            return torch.tensor([sent[-1], 90])

    sent: list[int] = []
    world = World(CPU, rank_info=RankInfo(0, 2, 0, 2))
    monkeypatch.setattr(budget, "free_bytes", lambda _: 400)
    monkeypatch.setattr(world, "all_gather", lambda own: sent.append(int(own)) or Gathered())
    assert shared_budget_bytes(world) == 90
    assert sent == [100]
    assert shared_budget_bytes(World(CPU)) == 200


# ---- the split of `fastmoco eval` ------------------------------------------------------------------------------------


def split(*, held_out: bool, labelled: bool = True) -> EvaluationSplit:
    pixels, labels = np.zeros((200, 4, 4, 3), np.uint8), np.arange(200) % 2
    index = ImageIndex.from_pixels("a", pixels, labels, ("x", "y")) if labelled else ImageIndex.from_pixels("a", pixels)
    if not labelled:
        everything = Subset.all_of(index)
        return EvaluationSplit(everything, everything, (), "200 images", "no labels")
    queries = Subset(index, np.arange(20)) if held_out else Subset.all_of(index)
    return EvaluationSplit(
        Subset(index, np.arange(20, 200)) if held_out else queries, queries, ("x", "y"), "200 images"
    )


@pytest.mark.parametrize("kind", [{"held_out": True}, {"held_out": False, "labelled": False}], ids=str)
def test_a_split_is_reduced_only_if_its_features_do_not_fit(kind: dict[str, Any]) -> None:
    original = split(**kind)
    assert fit_to_budget(original, 64, 10**6) is original
    reduced = fit_to_budget(original, 64, 40_000)
    assert len(reduced.bank) <= len(original.bank) // 2
    for subset in (reduced.bank, reduced.queries):
        assert len(subset) == len(subset.index), "only these images are extracted"
    assert (reduced.bank is reduced.queries) == (original.bank is original.queries)
    assert "of features exceed the" in reduced.description
    with pytest.raises(DeviceError, match="half of the free memory"):
        fit_to_budget(original, 64, 100)
