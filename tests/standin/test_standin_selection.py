"""How `fastmoco train` computes its step on devices that lack something: it trains, and says what it left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.standin.run import run_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MODEL = "--arch resnet18 --width 0.25 --stem cifar --crop-size 32 --batch-size 16 --moco-k 32"
RUN = "--data shapes --limit 64 --epochs 1 --knn-every 0 --pipeline resident --log-every 4"


def train(out: Path, *options: str, flags: tuple[str, ...] = (), tune: str = "off") -> dict[str, Any]:
    flags = ("--out", str(out), *MODEL.split(), *RUN.split(), "--tune", tune, *flags)
    return run_program("train", "--trust-values", *options, "--", *flags)


def chosen(report: dict[str, Any]) -> tuple[str, str, str, str]:
    assert report["exit_code"] == 0, report["output"] + report["error"]
    return tuple(report["settings"][name] for name in ("amp", "kernels", "compile", "cuda_graph"))


def test_all_fast_paths_are_compared_and_taken(tmp_path: Path) -> None:
    report = train(tmp_path / "run")
    assert chosen(report) == ("bf16", "triton", "off", "on")
    assert report["violations"] == 0
    assert "first step compared with plain PyTorch" in report["output"]
    assert "left out" not in report["output"]


def test_without_triton(tmp_path: Path) -> None:
    report = train(tmp_path / "run", "--without", "triton")
    assert chosen(report) == ("bf16", "torch", "off", "on")
    assert report["violations"] == 0
    assert "without fused kernels and torch.compile: Triton is not installed (pip install triton)" in report["output"]


def test_a_device_without_bfloat16(tmp_path: Path) -> None:
    assert chosen(train(tmp_path / "run", "--capability", "7.5")) == ("fp16", "triton", "off", "on")


def test_a_capture_that_is_refused_is_left_out(tmp_path: Path) -> None:
    report = train(tmp_path / "run", "--host-wait")
    assert chosen(report) == ("bf16", "triton", "off", "off")
    assert report["violations"] > 0, "the capture was tried"
    (line,) = [line for line in report["output"].splitlines() if "left out" in line]
    assert "CUDA graph" in line
    assert "cannot be captured" in line


def test_a_capture_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    report = train(tmp_path / "run", "--host-wait", flags=("--cuda-graph", "on"))
    assert report["exit_code"] == 2, report["output"] + report["error"]
    assert "cannot be captured as a CUDA graph" in report["output"]


def test_too_little_memory_for_any_way_is_an_error_of_one_line(tmp_path: Path) -> None:
    report = train(tmp_path / "run", "--memory", "60000000", flags=("--batch-size", "64", "--width", "1"))
    assert report["exit_code"] == 6, report["output"] + report["error"]
    assert "too little memory for --batch-size 64" in report["output"]


def test_every_way_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen means nothing without kernels that run; the run uses it, and remembers it."""
    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path))
    report = train(tmp_path / "run", tune="now", flags=("--compile", "off"))
    assert report["exit_code"] == 0, report["output"] + report["error"]
    assert report["violations"] == 0
    table = report["output"].partition("time of a step")[2]
    for name in ("triton kernels", "torch kernels", "contiguous stem", "CUDA graph", "prefetch", "with loading"):
        assert name in table, report["output"]
    (entry,) = json.loads((tmp_path / "tuning.json").read_text())["entries"].values()
    assert entry["choice"] == {name: report["settings"][name] for name in entry["choice"]}
