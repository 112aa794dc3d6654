"""Kernels that are right pass, and an error of 1 % in any of them is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.doctor import kernels, pixels, pointwise
from fastmoco.doctor.compare import worst
from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.model.batchnorm import cpu as batchnorm_cpu
from fastmoco.step import info_nce, sgd_ema

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement is one call."""
    monkeypatch.setattr("fastmoco.doctor.units.MAX_CALLS", 1)


def tiny_kernels() -> dict[str, Finding]:
    return {
        "batch norm": kernels.batch_norm_kernel("torch", CPU, (16, 8, 4, 4), "bf16"),
        "InfoNCE": kernels.info_nce_kernel("torch", CPU, 8, 64, 16),
        "SGD and EMA": kernels.update_kernel("torch", CPU, 1000),
        "colour": pixels.colour_kernel("torch", CPU, 4, 16),
        "crop": pixels.crop_kernel("torch", CPU, 4, 12),
    }


def test_kernels_are_right() -> None:
    for name, finding in tiny_kernels().items():
        assert finding.status == Status.OK, (name, finding)
        assert finding.figures["error"] <= finding.figures["allowed"]
        assert finding.figures["bytes_per_s"] > 0


@pytest.mark.parametrize("wrong", ["batch norm", "InfoNCE", "SGD and EMA", "colour", "crop"])
def test_an_error_in_a_kernel_is_found(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Of 1 %, and of one level in a crop more than rounding gives; only that kernel fails."""

    def scaled(function: Any) -> Any:
        return lambda *arguments, **options: 1.01 * function(*arguments, **options)

    def update(query: Tensor, key: Tensor, *rest: Tensor, **options: Any) -> None:
        correct(query, key, *rest, **options)
        key.mul_(1.01)

    def crops(images: Tensor, boxes: Tensor, out: Tensor) -> None:
        correct_crop(images, boxes, out)
        out.copy_((out.int() ^ 2).to(torch.uint8))

    correct, correct_crop = sgd_ema.momentum_update, pixels.crop_resize
    if wrong == "batch norm":
        monkeypatch.setattr(batchnorm_cpu, "split_batch_norm", scaled(batchnorm_cpu.split_batch_norm))
    elif wrong == "InfoNCE":
        monkeypatch.setattr(info_nce, "info_nce", scaled(info_nce.info_nce))
    elif wrong == "SGD and EMA":
        monkeypatch.setattr(sgd_ema, "momentum_update", update)
    elif wrong == "colour":
        monkeypatch.setattr(pixels.torch_ops, "apply", scaled(pixels.torch_ops.apply))
    else:
        monkeypatch.setattr(pixels, "crop_resize", crops)
    findings = tiny_kernels()
    assert [name for name, finding in findings.items() if finding.status == Status.FAILED] == [wrong]
    assert "is wrong: error" in findings[wrong].text
    assert findings[wrong].advice


def test_colour_on_a_cpu_tells_whether_it_is_compiled(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels.c_ops, "loop", lambda: pixels.c_ops.Loop(None, "no C compiler was found"))
    finding = pixels.colour(target)
    assert finding.status == Status.OK
    assert finding.figures["implementation"] == "torch"
    assert finding.text.endswith("it is not compiled: no C compiler was found")
    assert "apt-get install gcc" in finding.advice
    monkeypatch.undo()
    if pixels.c_ops.loop().library is None:
        pytest.skip(pixels.c_ops.loop().reason)
    finding = pixels.colour(target)
    assert finding.status == Status.OK
    assert finding.figures["implementation"] == "C"
    assert finding.figures["plain_seconds"] > 0
    assert not finding.advice


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_kernel_that_writes_nothing_is_found(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    correct = info_nce.info_nce
    monkeypatch.setattr(info_nce, "info_nce", lambda *arguments: correct(*arguments) * value)
    assert kernels.info_nce_kernel("torch", CPU, 8, 64, 16).status == Status.FAILED


@pytest.mark.slow
def test_triton_kernels_are_right_in_the_interpreter(require_backend: Any) -> None:
    require_backend("triton")
    # The interpreter cuts bfloat16 off where a device rounds it: float16 instead.
    for finding in (
        kernels.batch_norm_kernel("triton", CPU, (16, 8, 4, 4), "fp16"),
        kernels.info_nce_kernel("triton", CPU, 8, 64, 16),
        kernels.update_kernel("triton", CPU, 1000),
        pointwise.pointwise_kernel(CPU, pointwise.Shape(8, 16, 32, 4), "fp16"),
        pixels.colour_kernel("triton", CPU, 4, 16),
        pixels.crop_kernel("triton", CPU, 4, 12),
    ):
        assert finding.status == Status.OK, finding
        assert finding.figures["implementation"] in ("triton", "triton-fused")


def test_triton_is_not_for_a_cpu_and_its_absence_on_a_gpu_is_missing(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.triton(target).status == Status.SKIPPED
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    finding = kernels.triton(target._replace(device="cuda:0"))
    assert finding.status == Status.MISSING
    assert "pip install triton" in finding.advice
    assert kernels.implementation(torch.device("cuda", 0)) == "torch"


def test_a_device_on_which_plain_pytorch_is_wrong_too_hides_no_error() -> None:
    exact, nothing = {"y": torch.ones(4)}, {"y": torch.zeros(4)}
    assert worst(nothing, nothing, exact, floor=1e-6, dtype="fp32").excess > 1
    unknown = {"y": torch.full((4,), float("nan"))}
    assert worst(unknown, unknown, exact, floor=1e-6, dtype="fp32").excess > 1
    assert worst(exact, exact, exact, floor=1e-6, dtype="fp32").excess <= 1
