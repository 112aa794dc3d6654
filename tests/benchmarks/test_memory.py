"""Memory: what it is taken from where the usual source is missing, and what is released between readings."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks.measure import resources

CPU = torch.device("cpu")


def test_without_proportional_sizes_the_resident_ones_are_used_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    block = torch.ones(1 << 22)  # 16 MiB
    assert resources.memory_bytes() > block.nbytes
    for missing in (lambda self: SimpleNamespace(pss=0), lambda self: (_ for _ in ()).throw(FileNotFoundError)):
        monkeypatch.setattr(psutil.Process, "memory_full_info", missing)
        assert resources.memory_bytes() >= 0.5 * resources.resident_bytes()
        assert resources.memory_sources(CPU) == {"host": "resident set size"}


def test_without_a_record_of_the_peak_it_is_the_size_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "Name: python")
    assert resources.peak_resident_bytes() == pytest.approx(resources.resident_bytes(), rel=0.2)


def test_memory_that_dali_keeps_is_released_between_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    backend = SimpleNamespace(ReleaseUnusedMemory=lambda: calls.append("released"))
    monkeypatch.setitem(sys.modules, "nvidia.dali.backend", backend)
    resources.release_caches(CPU)
    assert calls == ["released"]


def test_a_gpu_without_nvml_is_asked_for_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "nvml_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    for name in ("memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 5)
    gpu = torch.device("cuda", 0)
    assert resources.device_memory(gpu) == {"allocated_bytes": 5, "reserved_bytes": 5, "nvml_bytes": 20}
    assert resources.memory_sources(gpu)["device"] == "cudaMemGetInfo"
