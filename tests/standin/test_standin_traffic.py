"""What the step does, launch by launch, beside what the model needs (`benchmarks.measure.traffic`)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from benchmarks.measure.traffic import count_step
from benchmarks.measure.variants import CONFIGS
from tests.standin.run import run_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Floors of one step on an H200, and what may be lost above them. They are estimates: no time is measured here.
FLOORS_MS = {"cifar": 5.2, "imagenet": 33.9, "imagenet-fused": 33.9}
ALLOWED = 1.35


@cache
def reports() -> dict[str, Any]:
    return run_program("traffic", "--add", "launch", *FLOORS_MS)


@pytest.mark.parametrize("mode", FLOORS_MS)
def test_the_step_moves_hardly_more_than_the_model_needs(mode: str) -> None:
    """FLOPs within 0.2 % (the recipe's head has a layer more), bytes at most 2 % above the least, and never below."""
    task, fused = CONFIGS["cifar" if mode == "cifar" else "r50"], mode.endswith("fused")
    found, needed = reports()[mode], count_step(task, 2, fused=fused)
    assert found["tflop"] * 1e12 == pytest.approx(sum(kernel.flops for kernel in needed), rel=2e-3)
    assert 1 <= found["gb"] * 1e9 / sum(kernel.bytes for kernel in needed) < 1.02


@pytest.mark.parametrize("mode", FLOORS_MS)
def test_the_estimated_time_is_near_the_floor(mode: str) -> None:
    assert reports()[mode]["ms"] < ALLOWED * FLOORS_MS[mode]


@pytest.mark.parametrize("mode", FLOORS_MS)
def test_one_more_operator_is_counted(mode: str) -> None:
    """`lr.add_(0)` reads and writes eight bytes in one launch."""
    before, after = reports()[mode], reports()[f"{mode}+launch"]
    assert after["launches"] == before["launches"] + 1
    assert (after["gb"] - before["gb"]) * 1e9 == pytest.approx(16, abs=0.1)
