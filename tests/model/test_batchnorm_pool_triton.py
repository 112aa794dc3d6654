"""The fused batch norm, ReLU and pooling of a stem against the three operations, in float64 and with torch's ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.model.test_batchnorm_triton import DEVICE, EPS, MOMENTUM, inputs, plain, relative

pytestmark = [pytest.mark.any_device, pytest.mark.usefixtures("poisoned_memory")]

# N, C, H, W, splits: even and odd sides, one row, one pixel, more channels than a block, several chunks
SHAPES = [(4, 8, 6, 6, 2), (6, 25, 5, 3, 3), (4, 3, 1, 7, 1), (12, 16, 1, 1, 2), (4, 130, 4, 2, 1), (8, 7, 30, 31, 2)]
LEAVES = ("x", "weight", "bias")


@pytest.fixture
def fused(require_backend: Callable[[str], None]) -> Callable[..., tuple[Tensor, Tensor]]:
    require_backend("triton")
    from fastmoco.model.batchnorm.triton_pool import split_batch_norm_pool

    return split_batch_norm_pool


def three_operations(*args: Any) -> tuple[Tensor, Tensor]:
    y = F.max_pool2d(plain(*args, relu=True, residual=None), 3, stride=2, padding=1)
    return y, y


def run(
    function: Callable[..., tuple[Tensor, Tensor]],
    tensors: dict[str, Tensor],
    splits: int,
    grads: tuple[Tensor | None, Tensor | None],
    *,
    device: str = "cpu",
    wide: bool = False,
) -> dict[str, Tensor]:
    def own(tensor: Tensor) -> Tensor:
        tensor = (tensor.double() if wide else tensor).clone().to(device)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    used = {name: own(tensors[name]) for name in (*LEAVES, "running_mean", "running_var")}
    for name in LEAVES:
        used[name] = torch.nn.Parameter(used[name])
    outputs = function(*used.values(), splits, MOMENTUM, EPS)
    assert torch.equal(*(y.nan_to_num(7.0) for y in outputs))
    pairs = [(y, own(grad)) for y, grad in zip(outputs, grads, strict=True) if grad is not None]
    torch.autograd.backward([y for y, _ in pairs], [grad for _, grad in pairs])
    found = {"y": outputs[0], "running_mean": used["running_mean"], "running_var": used["running_var"]}
    found |= {f"{name}.grad": used[name].grad for name in LEAVES}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items() if tensor is not None}


def gradients(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    samples, channels, height, width = shape
    one, two = torch.randn(2, samples, channels, (height + 1) // 2, (width + 1) // 2).to(dtype)
    return one, two


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("uses", ["both", "first", "second"])
def test_float32_equals_the_three_operations(fused: Any, shape: tuple[int, int, int, int, int], uses: str) -> None:
    tensors, splits = inputs(shape[:4], torch.float32), shape[4]
    one, two = gradients(shape[:4], torch.float32)
    grads = {"both": (one, two), "first": (one, None), "second": (None, two)}[uses]
    exact = run(three_operations, tensors, splits, grads, wide=True)
    found = run(fused, tensors, splits, grads, device=DEVICE)
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        assert relative(found[name], truth) <= 5e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits_is_no_larger_than_eager(fused: Any, dtype: torch.dtype) -> None:
    slack = 2.5 if DEVICE == "cpu" and dtype == torch.bfloat16 else 1.0  # the interpreter cuts bfloat16 off
    tensors = inputs((12, 24, 9, 6), dtype)
    # No two values of an image and channel are so close that rounding decides which is the largest of a window.
    order = tensors["x"].float().flatten(2).argsort(-1).argsort(-1)
    tensors["x"] = torch.linspace(-2.0, 2.0, 9 * 6)[order].view(12, 24, 9, 6).to(dtype)
    tensors["weight"] = tensors["weight"].abs() + 0.5
    grads = gradients((12, 24, 9, 6), dtype)
    exact = run(three_operations, tensors, 3, grads, wide=True)
    eager = run(three_operations, tensors, 3, grads)
    found = run(fused, tensors, 3, grads, device=DEVICE)
    for name, truth in exact.items():
        assert relative(found[name], truth) <= slack * relative(eager[name], truth) + 1e-4, name


def test_of_equal_values_the_first_gets_the_gradient_as_in_torch(fused: Any) -> None:
    tensors = inputs((4, 6, 8, 8), torch.float32)
    tensors["x"] = tensors["x"].mul(2).round()  # a few values only
    grads = gradients((4, 6, 8, 8), torch.float32)
    exact = run(three_operations, tensors, 2, grads, wide=True)
    found = run(fused, tensors, 2, grads, device=DEVICE)
    torch.testing.assert_close(found["x.grad"], exact["x.grad"], rtol=1e-4, atol=1e-5)


def test_windows_without_a_positive_value_have_no_gradient(fused: Any) -> None:
    tensors = inputs((4, 3, 6, 6), torch.float32)
    tensors["bias"] -= 100.0
    found = run(fused, tensors, 2, gradients((4, 3, 6, 6), torch.float32), device=DEVICE)
    for name in ("y", "x.grad", "weight.grad", "bias.grad"):
        assert not found[name].any(), name


def test_a_negative_weight_takes_the_smallest_input(fused: Any) -> None:
    tensors = inputs((4, 5, 7, 7), torch.float32)
    tensors["weight"] *= -1
    grads = gradients((4, 5, 7, 7), torch.float32)
    exact = run(three_operations, tensors, 1, grads, wide=True)
    found = run(fused, tensors, 1, grads, device=DEVICE)
    for name, truth in exact.items():
        assert relative(found[name], truth) <= 5e-6, name


def test_without_gradient_the_output_is_the_same(fused: Any) -> None:
    """As in the key encoder, where no index is stored."""
    tensors = {name: tensor.to(DEVICE) for name, tensor in inputs((4, 8, 6, 6), torch.float32).items()}
    names = (*LEAVES, "running_mean", "running_var")
    with_gradient = fused(*(tensors[n].clone().requires_grad_(n in LEAVES) for n in names), 2, MOMENTUM, EPS)
    without = fused(*(tensors[n].clone() for n in names), 2, MOMENTUM, EPS)
    assert torch.equal(with_gradient[0], without[0])
    assert not without[0].requires_grad


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
def test_not_a_number_comes_through(fused: Any) -> None:
    tensors = inputs((4, 3, 6, 6), torch.float32)
    tensors["x"][1, 2, 3, 3] = float("nan")
    found = run(fused, tensors, 2, gradients((4, 3, 6, 6), torch.float32), device=DEVICE)
    assert found["y"][:2, 2].isnan().all()
    assert found["y"][2:].isfinite().all()
    assert found["x.grad"][:2, 2].isnan().all()
