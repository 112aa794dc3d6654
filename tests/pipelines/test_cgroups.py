"""Processors that a container grants, simulated in a folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fastmoco.run import thread_count
from pipelines import cgroups, host_memory, platforms

V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu"


def write(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return str(root)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/a", f"{V2}/a/cpu.max": "max 100000"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b", f"{V2}/a/b/cpu.max": "max 100000", f"{V2}/a/cpu.max": "250000 100000"}, 2.5),
        ({"proc/self/cgroup": "0::/not/mounted", f"{V2}/cpu.max": "50000 100000"}, 0.5),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job/step\n0::/",
                f"{V1}/job/step/cpu.cfs_quota_us": "-1",
                f"{V1}/job/step/cpu.cfs_period_us": "100000",
                f"{V1}/job/cpu.cfs_quota_us": "350000",
                f"{V1}/job/cpu.cfs_period_us": "100000",
            },
            3.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job",
                f"{V2}/cpu,cpuacct/job/cpu.cfs_quota_us": "100000",
                f"{V2}/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            1.0,
        ),
    ],
    ids=["none", "no limit", "parent", "container", "version 1", "joint mount"],
)
def test_the_quota(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    assert cgroups.cpu_quota(write(tmp_path, files)) == expected


@pytest.mark.parametrize(("quota", "usable"), [(math.inf, 64), (0.2, 1), (1.0, 1), (2.5, 3), (100.0, 64)])
def test_usable_processors(monkeypatch: pytest.MonkeyPatch, quota: float, usable: int) -> None:
    monkeypatch.setattr(platforms, "affine_cpus", lambda: 64)
    monkeypatch.setattr(platforms, "cpu_quota", lambda: quota)
    assert platforms.usable_cpus() == usable


def test_torch_runs_no_more_threads_than_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr(thread_count, "usable_cpus", lambda: 2)
        with thread_count.threads_restored():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
        with thread_count.threads_restored(3):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_limit_at_which_a_group_is_throttled(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a",
        f"{V2}/a/memory.max": "max",
        f"{V2}/a/memory.high": "1000",
        f"{V2}/a/memory.current": "700",
        f"{V2}/a/memory.stat": "inactive_file 100",
    }
    assert host_memory.in_container_bytes(write(tmp_path, files)) == 400
