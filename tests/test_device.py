"""Number formats by hardware, and deterministic runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.deterministic

from fastmoco.console import counted
from fastmoco.device import describe, make_deterministic, pick_amp, pick_device
from tests.run.test_train import RESIDENT, newest, trained

CPU = torch.device("cpu")
MEMORY: Any = torch.utils.deterministic


@pytest.mark.parametrize(("major", "amp"), [(7, "fp16"), (8, "bf16"), (9, "bf16"), (12, "bf16")])
def test_a_gpu_multiplies_bfloat16_from_ampere_on(major: int, amp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    assert pick_amp("auto", torch.device("cuda", 0)) == amp
    assert pick_amp("fp32", torch.device("cuda", 0)) == "fp32"


@pytest.mark.parametrize("unit", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_a_cpu_uses_bfloat16_where_it_multiplies_it(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert pick_amp("auto", CPU) == "fp32"
    monkeypatch.setattr(torch.cpu, unit, lambda: True)
    assert pick_amp("auto", CPU) == "bf16"
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)  # they are private to torch
    assert pick_amp("auto", CPU) == "fp32"


def test_without_cuda_the_device_is_the_cpu() -> None:
    assert pick_device("auto") == CPU
    assert describe(CPU) == f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def test_deterministic_runs_do_not_fill_new_memory() -> None:
    MEMORY.fill_uninitialized_memory = True  # torch's default
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not MEMORY.fill_uninitialized_memory


@pytest.mark.parametrize(
    "flags", [["--symmetric"], pytest.param(["--mlp", "--amp", "bf16"], marks=pytest.mark.slow)], ids=" ".join
)
def test_no_step_reads_memory_that_nothing_has_written(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New memory is NaN in one of two runs."""

    def poisoned() -> None:
        torch.use_deterministic_algorithms(True)
        MEMORY.fill_uninitialized_memory = True

    flags = [
        *RESIDENT,
        *flags,
        "--deterministic",
        "--epochs",
        "1",
        "--limit",
        "24",
        "--no-tensorboard",
        "--knn-every",
        "0",
    ]
    plain = newest(trained(tmp_path / "plain", settings=flags))
    monkeypatch.setattr("fastmoco.run.start.make_deterministic", poisoned)
    filled = newest(trained(tmp_path / "filled", settings=flags))
    assert MEMORY.fill_uninitialized_memory
    assert [name for name, tensor in plain.items() if not torch.equal(tensor, filled[name])] == []
    assert int(plain["queue/pointer"]) == 24 * (2 if "--symmetric" in flags else 1) % 16
