"""A case that fails, at building or in a round, costs no other its readings, and every round is written."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import report, roofline, step
from benchmarks.measure.plain import Task
from benchmarks.measure.turns import attempt, interleave, reason, save
from benchmarks.measure.variants import VARIANTS, Variant
from fastmoco.errors import ConfigError
from pipelines.errors import BackendMissingError

CPU = torch.device("cpu")
OUT_OF_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
)
FAILURES = [
    (ConfigError("--kernels triton needs Triton"), "--kernels triton needs Triton"),
    (BackendMissingError("DALI is not installed:\n  install it"), "DALI is not installed: install it"),
    (OUT_OF_MEMORY, "too little memory for another 2.00 GiB"),
    (RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"), "RuntimeError: CUDA error"),
    (KeyError("num_warps"), "KeyError: 'num_warps'"),
    (TimeoutError(), "TimeoutError: no message"),
]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize(("error", "expected"), FAILURES)
def test_a_failure_is_one_line_with_its_cause(error: Exception, expected: str) -> None:
    left_out: dict[str, str] = {}

    def fail() -> int:
        raise error

    assert attempt(fail, "a", left_out) is None
    assert left_out["a"] == reason(error)
    assert left_out["a"].startswith(expected)
    assert "\n" not in left_out["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interruption_is_no_failure(error: BaseException) -> None:
    def interrupt() -> int:
        raise error

    with pytest.raises(type(error)):
        attempt(interrupt, "a", {})


def failing_in(number: int, error: Exception) -> Callable[[], dict[str, float]]:
    """A case that fails at its reading of this number, from 1."""
    calls: list[int] = []

    def case() -> dict[str, float]:
        calls.append(1)
        if len(calls) == number:
            raise error
        return {"n": len(calls)}

    return case


def test_a_case_that_fails_in_a_round_is_left_out_and_the_others_have_all_rounds() -> None:
    left_out: dict[str, str] = {}
    written: list[tuple[int, dict[str, int]]] = []
    cases = {
        "good": failing_in(99, OUT_OF_MEMORY),
        "bad": failing_in(2, OUT_OF_MEMORY),
        "last": failing_in(3, ValueError("x")),
    }
    readings = interleave(
        cases,
        4,
        left_out=left_out,
        after_round=lambda so_far, rounds: written.append((rounds, {name: len(r) for name, r in so_far.items()})),
    )
    assert {name: len(of_case) for name, of_case in readings.items()} == {"good": 4}
    assert left_out == {
        "bad": "too little memory for another 2.00 GiB (in round 2 of 4)",
        "last": "ValueError: x (in round 3 of 4)",
    }
    assert written == [
        (1, {"good": 1, "bad": 1, "last": 1}),
        (2, {"good": 2, "last": 2}),
        (3, {"good": 3}),
        (4, {"good": 4}),
    ]


def test_when_no_case_is_left_all_reasons_are_named() -> None:
    with pytest.raises(ConfigError, match=r"a at 8: ValueError: x \(in round 1 of 2\)"):
        interleave({8: failing_in(1, ValueError("x"))}, 2, left_out={}, label=lambda point: f"a at {point}")


def test_a_result_is_complete_only_after_its_last_round(tmp_path: Path) -> None:
    result: dict[str, Any] = {"benchmark": "x"}
    for rounds, complete in ((1, False), (2, True)):
        save(tmp_path / "x.json", result, rounds, 2)
        assert json.loads((tmp_path / "x.json").read_text())["complete"] is complete
    save(None, result, 2, 2, complete=False)
    assert result["complete"] is False


# ---- the step --------------------------------------------------------------------------------------------------------


class Runner:
    """A step that is built or read at once, and fails as its variant's name says."""

    warm_up_s = 0.0

    def __init__(self, variant: Variant, task: Task, device: torch.device, dtype: torch.dtype, *_: Any) -> None:
        if variant.name in ("triton", "graph"):
            raise FAILURES[0][0] if variant.name == "triton" else RuntimeError("capture refused")
        self.dtype = dtype if variant.low_precision else torch.float32
        self.memory = {"allocated_bytes": 1e9, "reserved_bytes": 4e9, "peak_allocated_bytes": 3e9, "nvml_bytes": 4e9}
        failing = {"one-pass": (1, OUT_OF_MEMORY), "trainstep": (2, RuntimeError("CUDA error"))}
        self._read = failing_in(*failing.get(variant.name, (99, OUT_OF_MEMORY)))

    def __call__(self) -> dict[str, float]:
        ms = 1.0 + self._read()["n"]
        return {"ms": ms, "images_per_s": 1e3 / ms}


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "Runner", Runner)
    monkeypatch.setattr(step, "step_flops", lambda task: 10**9)
    monkeypatch.setattr(step, "pick_amp", lambda name, device: "bf16")
    monkeypatch.setattr(step, "matrix_product", lambda name, device, side: lambda: None)
    everywhere = tuple(replace(variant, only_on=None) for variant in VARIANTS)
    monkeypatch.setattr(step, "VARIANTS", everywhere)


SETTINGS = step.Settings(quick=True, device="cpu", rungs="plain,amp,one-pass,trainstep,triton,graph")


def test_variants_of_the_step_that_fail_are_listed_and_the_others_are_written(tmp_path: Path, simulated: None) -> None:
    step.main(replace(SETTINGS, out=tmp_path), quiet())
    result = json.loads((tmp_path / "step-cifar.json").read_text())
    assert list(result["rungs"]) == ["plain", "amp"]
    assert all(len(rung["images_per_s"]["values"]) == 2 for rung in result["rungs"].values())
    assert (result["complete"], result["rounds"]) == (True, 2)
    assert result["left_out"] == {
        "triton": "--kernels triton needs Triton",
        "graph": "RuntimeError: capture refused",
        "one-pass": "too little memory for another 2.00 GiB (in round 1 of 2)",
        "trainstep": "RuntimeError: CUDA error (in round 2 of 2)",
    }
    text = report.main(report.Settings(results=tmp_path))[0].read_text(encoding="utf-8")
    assert "Not measured: graph (RuntimeError: capture refused)" in text
    assert "peak memory of the training step, resnet18 at 16 px, batch 8, `amp`: **3.00 GB**, 100% of the plain" in text
    assert "| amp | 3,000 | 100% | 4,000 | 4,000 |" in text


@pytest.mark.parametrize(
    ("amp", "formats"),
    [
        ("bf16", {"plain": "fp32", "channels-last": "fp32", "amp": "bf16", "compile": "bf16"}),
        ("fp32", {"plain": "fp32", "channels-last": "fp32", "compile": "fp32"}),
    ],
)
def test_every_variant_is_held_against_a_product_in_the_format_in_which_it_trains(
    amp: str, formats: dict[str, str], tmp_path: Path, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[str] = []

    def product(name: str, device: torch.device, side: int) -> Callable[[], None]:
        products.append(name)
        return lambda: time.sleep({"fp32": 0.02, "bf16": 0.005}[name])

    monkeypatch.setattr(step, "matrix_product", product)
    monkeypatch.setattr(step, "pick_amp", lambda name, device: amp)
    names = "plain,channels-last,amp,compile"
    step.main(replace(SETTINGS, out=tmp_path, rungs=names), quiet())
    result = json.loads((tmp_path / "step-cifar.json").read_text())
    assert {name: rung["format"] for name, rung in result["rungs"].items()} == formats
    assert products == list(result["peaks_tflop_per_s"]) == list(dict.fromkeys(formats.values()))
    for rung in result["rungs"].values():
        peak = result["peaks_tflop_per_s"][rung["format"]]["median"]
        assert rung["share_of_roofline"] == pytest.approx(rung["tflop_per_s"] / peak)
    assert ("amp" in result["left_out"]) == (amp == "fp32")
    rates = roofline._from_step(result, CPU).rates
    assert {name: number_format for name, number_format, _ in rates} == formats


@pytest.mark.parametrize(
    ("amp", "capability", "batch", "missing"),
    [
        ("bf16", "AVX512", 512, ["winograd"]),
        ("fp32", "AVX2", 128, ["amp"]),
        ("fp32", "AVX512", 128, ["amp", "winograd"]),
    ],
)
def test_the_cpu_suite_has_the_variants_of_the_processor(
    amp: str, capability: str, batch: int, missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "pick_amp", lambda name, device: amp)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(step, "Runner", lambda variant, *_: variant.name)
    settings = step.Settings(suite="cpu", device="cpu")
    (ablation,) = step._ablations(settings)
    assert ablation.task.batch_size == batch
    left_out: dict[str, str] = {}
    built = list(step._build(ablation, settings, CPU, step.DTYPES[amp], left_out))
    assert list(left_out) == missing
    assert built[0] == "plain"
    assert built[-1] == "kept-memory"  # the step of `fastmoco train`
    assert "compile" not in built


def test_a_run_that_is_killed_has_written_its_rounds_and_the_report_says_so(
    tmp_path: Path, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Runner):
        def __call__(self) -> dict[str, float]:
            reading = super().__call__()
            if reading["ms"] == 4.0:  # the third
                raise KeyboardInterrupt
            return reading

    monkeypatch.setattr(step, "Runner", Killed)
    settings = replace(SETTINGS, out=tmp_path, rungs="plain,amp", quick=False, repetitions=5, seconds=0.01)
    with pytest.raises(KeyboardInterrupt):
        step.main(settings, quiet())
    result = json.loads((tmp_path / "step-cifar.json").read_text())
    assert (result["complete"], result["rounds"], result["planned_rounds"]) == (False, 2, 5)
    assert len(result["rungs"]["amp"]["ms"]["values"]) == 2
    text = report.main(report.Settings(results=tmp_path))[0].read_text(encoding="utf-8")
    assert "**Stopped after 2 of 5 rounds.**" in text


def test_a_task_on_which_every_variant_fails_costs_the_other_tasks_nothing(
    tmp_path: Path, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = step.Ablation("first", step.CONFIGS["cifar"], tuple(v for v in step.VARIANTS if v.name == "graph"))
    second = replace(first, name="second", variants=step.VARIANTS[:1])
    monkeypatch.setattr(step, "_ablations", lambda settings: [first, second])
    results = step.main(replace(SETTINGS, out=tmp_path), quiet())
    assert [list(result["rungs"]) for result in results] == [[], ["plain"]]
    assert "capture refused" in report.main(report.Settings(results=tmp_path))[0].read_text(encoding="utf-8")
    monkeypatch.setattr(step, "_ablations", lambda settings: [first])
    with pytest.raises(ConfigError, match="capture refused"):
        step.main(SETTINGS, quiet())
