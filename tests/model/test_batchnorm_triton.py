"""The fused batch norm against a loop over groups in float64: outputs, all gradients, running statistics."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.model.batchnorm.split import SplitBatchNorm2d

pytestmark = [pytest.mark.any_device, pytest.mark.usefixtures("poisoned_memory")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOMENTUM, EPS = 0.1, 1e-5
# N, C, H, W, splits: one tile, ragged tiles and channels, one pixel, more channels than a block, several chunks
SHAPES = [(4, 3, 3, 3, 2), (6, 25, 5, 3, 3), (12, 16, 1, 1, 2), (4, 130, 2, 2, 1), (8, 7, 40, 41, 2), (16, 64, 4, 4, 8)]


@pytest.fixture
def fused(require_backend: Callable[[str], None]) -> ModuleType:
    require_backend("triton")
    from fastmoco.model.batchnorm import triton as batchnorm_triton

    return batchnorm_triton


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, offset: float = 0.5) -> dict[str, Tensor]:
    """Fresh numbers in every run; activations with a mean and a spread of its own in every channel."""
    channels = shape[1]
    spread, mean = 0.5 + torch.rand(channels, 1, 1), offset * (1 + torch.rand(channels, 1, 1))
    return {
        "x": (spread * torch.randn(shape) + mean).to(dtype),
        "weight": 0.5 + torch.rand(channels),
        "bias": 0.3 * torch.randn(channels),
        "residual": torch.randn(shape).to(dtype),
        "grad": torch.randn(shape).to(dtype),
        "running_mean": torch.randn(channels),
        "running_var": 0.5 + torch.rand(channels),
    }


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    splits: int,
    momentum: float,
    eps: float,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    """SplitBatchNorm2d, and what follows it in a block."""
    norm = SplitBatchNorm2d(x.shape[1], splits, eps=eps, momentum=momentum).to(x.device, weight.dtype)
    norm.weight, norm.bias = weight, bias  # pyright: ignore[reportAttributeAccessIssue]
    norm.running_mean, norm.running_var = running_mean, running_var
    y = norm(x)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y


def run(
    batch_norm: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    splits: int,
    relu: bool,
    with_residual: bool,
    device: str = "cpu",
    wide: bool = False,
) -> dict[str, Tensor]:
    own = {}
    for name, tensor in tensors.items():
        tensor = (tensor.double() if wide else tensor).clone().to(device)
        own[name] = tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    leaves = ("x", "weight", "bias", "residual")
    for name in leaves:
        own[name] = torch.nn.Parameter(own[name])
    residual = own["residual"] if with_residual else None
    y = batch_norm(
        *(own[n] for n in ("x", "weight", "bias", "running_mean", "running_var")),
        splits,
        MOMENTUM,
        EPS,
        relu,
        residual,
    )
    y.backward(own["grad"])
    found = {"y": y, "running_mean": own["running_mean"], "running_var": own["running_var"]}
    found |= {f"{n}.grad": own[n].grad for n in leaves if own[n].grad is not None}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize(
    ("relu", "with_residual"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["alone", "relu", "residual", "residual-relu"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_float32_equals_the_plain_version(
    fused: ModuleType, shape: tuple[int, int, int, int, int], relu: bool, with_residual: bool
) -> None:
    tensors, splits = inputs(shape[:4], torch.float32), shape[4]
    exact = run(plain, tensors, splits, relu, with_residual, wide=True)
    found = run(fused.split_batch_norm, tensors, splits, relu, with_residual, DEVICE)
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        assert relative(found[name], truth) <= 5e-6, name


@pytest.mark.parametrize(("relu", "with_residual"), [(True, False), (True, True)], ids=["relu", "residual-relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits_is_no_larger_than_eager(
    fused: ModuleType, dtype: torch.dtype, relu: bool, with_residual: bool
) -> None:
    # Triton's interpreter cuts bfloat16 off where a device rounds it, which doubles the error of a result.
    slack = 2.5 if DEVICE == "cpu" and dtype == torch.bfloat16 else 1.0
    tensors = inputs((12, 24, 6, 5), dtype)
    exact = run(plain, tensors, 3, relu, with_residual, wide=True)
    eager = run(plain, tensors, 3, relu, with_residual)
    found = run(fused.split_batch_norm, tensors, 3, relu, with_residual, DEVICE)
    for name, truth in exact.items():
        assert relative(found[name], truth) <= slack * relative(eager[name], truth) + 1e-4, name


@pytest.mark.parametrize("offset", [100.0, 3000.0])
def test_a_mean_far_larger_than_the_spread(fused: ModuleType, offset: float) -> None:
    """Where E[x²] − E[x]² has no digits left."""
    tensors = inputs((8, 5, 20, 21), torch.float32, offset)
    exact = run(plain, tensors, 2, False, False, wide=True)
    found = run(fused.split_batch_norm, tensors, 2, False, False, DEVICE)
    assert relative(found["running_var"], exact["running_var"]) <= 1e-5
    assert (found["y"] - exact["y"]).abs().max() <= 2e-6 * offset


@pytest.mark.parametrize("uses", ["both", "first", "second"])
@pytest.mark.parametrize(("relu", "with_residual"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_uses_of_the_output_have_their_gradients_added(
    fused: ModuleType, dtype: torch.dtype, relu: bool, with_residual: bool, uses: str
) -> None:
    """As autograd adds them: the same bits, but for Triton's interpreter, which cuts bfloat16 off."""
    tensors = inputs((6, 25, 5, 3), dtype)
    second = torch.randn(tensors["grad"].shape).to(dtype)
    total = {"both": tensors["grad"] + second, "first": tensors["grad"], "second": second}[uses]

    def used(*args: Any) -> Tensor:
        y, again = fused.split_batch_norm(*args, twice=True)
        assert torch.equal(y, again)
        return Uses.apply(y, again, second.to(DEVICE), uses)

    once = run(fused.split_batch_norm, {**tensors, "grad": total}, 3, relu, with_residual, DEVICE)
    twice = run(used, tensors, 3, relu, with_residual, DEVICE)
    assert twice.keys() == once.keys()
    for name, tensor in once.items():
        assert torch.equal(twice[name], tensor) or (
            (DEVICE, dtype, uses) == ("cpu", torch.bfloat16, "both") and relative(twice[name], tensor) <= 2**-7
        ), name


class Uses(torch.autograd.Function):
    """Passes its gradient to the first, a given one to the second, or only one of the two."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, again: Tensor, second: Tensor, uses: str) -> Tensor:
        ctx.second, ctx.uses = second, uses
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        first, second = ctx.uses in ("both", "first"), ctx.uses in ("both", "second")
        return grad if first else None, ctx.second if second else None, None, None


def test_groups_do_not_see_each_other(fused: ModuleType) -> None:
    tensors = inputs((8, 6, 4, 4), torch.float32)
    both = run(fused.split_batch_norm, tensors, 2, True, True, DEVICE)
    half = {n: t[:4] if t.dim() == 4 else t for n, t in tensors.items()}
    first = run(fused.split_batch_norm, half, 1, True, True, DEVICE)
    for name in ("y", "x.grad", "residual.grad"):
        torch.testing.assert_close(both[name][:4], first[name], rtol=1e-5, atol=1e-6)


def test_any_strides_go_in_and_channels_last_comes_out(fused: ModuleType) -> None:
    tensors = inputs((4, 6, 3, 5), torch.float32)
    statistics = tensors["running_mean"].to(DEVICE), tensors["running_var"].to(DEVICE)
    x = tensors["x"].to(DEVICE).requires_grad_()
    y = fused.split_batch_norm(x, tensors["weight"].to(DEVICE), tensors["bias"].to(DEVICE), *statistics, 2, 0.1, EPS)
    y.sum().backward()  # its gradient is expanded from one number
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.zeros_like(x), atol=1e-5, rtol=0)  # a sum of normalised values is constant


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
def test_not_a_number_comes_through_the_relu(fused: ModuleType) -> None:
    tensors = inputs((4, 3, 2, 2), torch.float32)
    tensors["x"][1, 2, 0, 1] = float("nan")
    found = run(fused.split_batch_norm, tensors, 2, True, False, DEVICE)
    assert found["y"][:2, 2].isnan().all()
    assert found["y"][2:].isfinite().all()
    assert found["x.grad"][:2, 2].isnan().all()


@pytest.mark.gpu
def test_replays_in_a_cuda_graph_on_fresh_inputs(fused: ModuleType) -> None:
    shape = (64, 48, 9, 7)
    tensors = {n: t.to(DEVICE) for n, t in inputs(shape, torch.float32).items()}
    x = tensors["x"].contiguous(memory_format=torch.channels_last).requires_grad_()
    others = [tensors[n] for n in ("weight", "bias", "running_mean", "running_var")]

    def step() -> tuple[Tensor, Tensor]:
        y = fused.split_batch_norm(x, *others, 8, MOMENTUM, EPS, True, tensors["residual"])
        return y, torch.autograd.grad(y, x, tensors["grad"])[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, x_grad = step()
    fresh = inputs(shape, torch.float32)
    with torch.no_grad():
        for name, tensor in tensors.items():
            (x if name == "x" else tensor).copy_(fresh[name])
    graph.replay()
    exact = run(plain, fresh, 8, True, True, wide=True)
    found = {"y": y, "x.grad": x_grad, "running_mean": others[2], "running_var": others[3]}
    for name, tensor in found.items():
        assert relative(tensor.detach().double().cpu(), exact[name]) <= 5e-6, name
