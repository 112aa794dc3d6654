"""Facts about the machine and the device, also in containers, on full disks and with a broken torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from fastmoco.doctor import choices, device, disk, machine
from fastmoco.doctor.findings import CHOICES, Status, Target
from fastmoco.doctor.isolation import attempt
from fastmoco.doctor.units import bytes_text, one_line, si
from fastmoco.errors import DeviceError
from pipelines import cgroups, host_memory


def test_machine(target: Target) -> None:
    software = machine.software(target)
    assert software.figures["torch"] == torch.__version__.partition("+")[0]
    assert machine.processor(target).figures["usable_cores"] >= 1
    memory = machine.memory(target).figures
    assert 0 < memory["free_bytes"] <= memory["total_bytes"]
    for check in (machine.shared_memory, machine.open_files):
        assert check(target).status in (Status.OK, Status.MISSING)


def test_torch_that_cannot_be_imported_is_a_finding(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = machine.software(target)
    assert finding.status == Status.FAILED
    assert "torch cannot be imported" in finding.text
    assert "pip install" in finding.advice


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_a_container(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    files = {
        1: {
            "cpu.cfs_quota_us": "150000",
            "cpu.cfs_period_us": "100000",
            "memory.limit_in_bytes": str(2**31),
            "memory.usage_in_bytes": str(2**30),
            "memory.stat": f"total_inactive_file {2**29}",
        },
        2: {
            "cpu.max": "150000 100000",
            "memory.max": str(2**31),
            "memory.current": str(2**30),
            "memory.stat": f"inactive_file {2**29}",
        },
    }[version]
    files["proc/self/cgroup"] = {1: "4:memory,cpu:/", 2: "0::/"}[version]
    for name, text in files.items():
        controller = {1: name.partition(".")[0], 2: ""}[version]
        path = tmp_path / name if name.startswith("proc") else tmp_path / "sys/fs/cgroup" / controller / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    limits, quota = host_memory.container_limits(str(tmp_path)), cgroups.cpu_quota(str(tmp_path))
    monkeypatch.setattr(host_memory, "container_limits", lambda: limits)
    monkeypatch.setattr(machine, "affine_cpus", lambda: 8)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert quota == 1.5
    assert limits == [(2**31, 2**29)]
    assert "the container's quota is 1.5 of 8 cores" in machine.processor(target).advice
    memory = machine.memory(target)
    assert memory.figures["total_bytes"] == 2**31
    assert memory.figures["free_bytes"] <= 2**31 - 2**29
    assert memory.advice


def test_disk_leaves_nothing(target: Target) -> None:
    before = sorted(os.listdir(target.folder))
    figures = disk.disk(target).figures
    assert all(figures[name] > 0 for name in ("read_bytes_per_s", "write_bytes_per_s", "fsync_s", "small_files_per_s"))
    assert sorted(os.listdir(target.folder)) == before


def test_a_full_disk_is_not_written_to(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: os.terminal_size((1, 1)) and type("U", (), {"free": 10, "total": 99})
    )
    finding = disk.disk(target)
    assert finding.status == Status.SKIPPED
    assert "free some space" in finding.advice


def test_device(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpus_of_driver", list)
    assert device.device(target).figures["device"] == "cpu"
    monkeypatch.setattr(device, "_SIDE", {"cpu": 8})
    assert device.arithmetic(target).figures["fp32_flop_per_s"] > 0
    monkeypatch.setattr(device, "_COPY_BYTES", {"cpu": 1024})
    assert device.copies(target).figures["memory_bytes_per_s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_torch_cannot_use_is_missing(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpus_of_driver", lambda: ["NVIDIA H100"])
    finding = device.device(target._replace(device="auto"))
    assert finding.status == Status.MISSING
    assert "the driver lists NVIDIA H100" in finding.text
    assert finding.figures["device"] == "cpu"
    assert device.device(target).status == Status.OK, "--device cpu"
    with pytest.raises(DeviceError, match="--device cuda, but torch"):
        device.device(target._replace(device="cuda"))


def test_choices_are_those_of_training(target: Target) -> None:
    finding = choices.choices(target)
    assert finding.status == Status.OK
    assert finding.figures["kernels"] == "torch"
    assert finding.figures["cuda_graph"] == "off"
    assert finding.figures["small_data_pipeline"] == "resident"
    assert attempt(CHOICES, target).figures.keys() == finding.figures.keys()


def test_units() -> None:
    assert [bytes_text(n) for n in (12, 2048, 64 * 2**20, 1.5 * 2**30, 2**41)] == [
        "12 B", "2.0 KiB", "64 MiB", "1.5 GiB", "2.0 TiB",
    ]  # fmt: skip
    assert [si(v, "B/s") for v in (3.35e12, 1.2e10, 8.5e7, 999.0)] == ["3.35 TB/s", "12 GB/s", "85 MB/s", "999 B/s"]
    assert [si(v, "s") for v in (2.0, 0.0217, 2.2e-6)] == ["2 s", "21.7 ms", "2.2 µs"]
    assert one_line(" a\n\x1b[0m b\t") == "a [0m b"
    assert one_line("one two three four", 11) == "one two …"
