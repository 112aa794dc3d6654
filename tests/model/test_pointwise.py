"""The fused 1×1 convolution against convolution and batch norm in float64: outputs, gradients, running statistics."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.model.batchnorm.split import SplitBatchNorm2d

pytestmark = [pytest.mark.any_device, pytest.mark.usefixtures("poisoned_memory")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOMENTUM, EPS = 0.1, 1e-5
KINK = 0.1
NORMS = ("weight", "bias", "running_mean", "running_var")


class Shape(NamedTuple):
    samples: int
    inputs: int
    side: int
    outputs: int
    splits: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


# One tile; ragged channels of narrow networks and 7×7 pixels; more channels than a tile both ways; several tiles and
# chunks of rows; one pixel
SHAPES = [
    Shape(2, 16, 4, 16, 1),
    Shape(8, 20, 7, 40, 8),
    Shape(4, 24, 7, 6, 2),
    Shape(2, 130, 3, 136, 1),
    Shape(4, 10, 21, 20, 2),
    Shape(32, 64, 1, 32, 4),
]
# How the input comes: as it is, or with batch norm and ReLU pending, or with those and a residual
KINDS = ("plain", "pending", "residual")


@pytest.fixture
def fused(require_backend: Callable[[str], None]) -> ModuleType:
    require_backend("triton")
    from fastmoco.model.pointwise import op

    return op


def inputs(shape: Shape, dtype: torch.dtype, offset: float = 0.5) -> dict[str, Tensor]:
    """Fresh numbers in every run. The weights are such that the result has values of about 1."""

    def norm(prefix: str, channels: int) -> dict[str, Tensor]:
        return {
            f"{prefix}weight": 0.5 + torch.rand(channels),
            f"{prefix}bias": 0.3 * torch.randn(channels),
            f"{prefix}running_mean": torch.randn(channels),
            f"{prefix}running_var": 0.5 + torch.rand(channels),
        }

    x = torch.randn(shape.samples, shape.inputs, shape.side, shape.side)
    x = (0.5 + torch.rand(shape.inputs, 1, 1)) * x + offset * (1 + torch.rand(shape.inputs, 1, 1))
    y = shape.samples, shape.outputs, shape.side, shape.side
    residual = torch.randn(x.shape)
    return {
        "x": x.to(dtype),
        "matrix": (torch.randn(shape.outputs, shape.inputs, 1, 1) / shape.inputs**0.5).to(dtype),
        "residual": residual.to(dtype),
        "last_residual": torch.randn(y).to(dtype),
        "grad": torch.randn(y).to(dtype),
        "applied_grad": torch.randn(x.shape).to(dtype),
        **norm("", shape.outputs),
        **norm("before_", shape.inputs),
    }


def batch_norm(x: Tensor, tensors: dict[str, Tensor], prefix: str, splits: int) -> Tensor:
    layer = SplitBatchNorm2d(x.shape[1], splits, eps=EPS, momentum=MOMENTUM).to(x.device, tensors["weight"].dtype)
    for name in NORMS:
        setattr(layer, name, tensors[prefix + name])
    return layer(x)


def plain(tensors: dict[str, Tensor], splits: int, kind: str) -> tuple[Tensor, ...]:
    """relu(batch_norm(conv2d(x)) + residual) of x, of relu(batch_norm(x)), or of x' = relu(batch_norm(x) + residual),
    and x'."""
    x = tensors["x"]
    if kind != "plain":
        x = batch_norm(x, tensors, "before_", splits)
        x = torch.relu(x + tensors["residual"] if kind == "residual" else x)
    y = batch_norm(F.conv2d(x, tensors["matrix"]), tensors, "", splits)
    y = torch.relu(y + tensors["last_residual"])
    return (y, x) if kind == "residual" else (y,)


def settled(tensors: dict[str, Tensor], splits: int, kind: str) -> dict[str, Tensor]:
    """The same without values that rounding could move across the kink of a ReLU: an error as large as the gradient."""

    def norm(x: Tensor, prefix: str) -> Tensor:
        own = {name: tensor.clone() for name, tensor in found.items()}
        own |= {prefix + name: torch.nn.Parameter(own[prefix + name]) for name in ("weight", "bias")}
        return batch_norm(x, own, prefix, splits).detach()

    def distance(z: Tensor) -> Tensor:
        return torch.where(z.abs() < KINK, KINK * z.sign(), 0.0)

    dtype, found = tensors["x"].dtype, {name: tensor.double() for name, tensor in tensors.items()}
    x = found["x"]
    if kind != "plain":
        z = norm(x, "before_")
        if kind == "residual":
            found["residual"] = found["residual"] + distance(z + found["residual"])
            x = torch.relu(z + found["residual"])
        else:
            spread = x.std((0, 2, 3), keepdim=True) / found["before_weight"][:, None, None]
            found["x"] = found["x"] + distance(z) * spread
            x = torch.relu(norm(found["x"], "before_"))
    y = norm(F.conv2d(x, found["matrix"]), "")
    found["last_residual"] = found["last_residual"] + distance(y + found["last_residual"])
    moved = ("x", "residual", "last_residual")
    return tensors | {name: found[name].to(dtype) for name in moved}


def fused_with(op: ModuleType) -> Callable[..., tuple[Tensor, ...]]:
    def run(tensors: dict[str, Tensor], splits: int, kind: str) -> tuple[Tensor, ...]:
        after, earlier = (op.Norm(*(tensors[prefix + name] for name in NORMS)) for prefix in ("", "before_"))
        x = tensors["x"]
        if kind != "plain":
            x = op.normalise_later(x, earlier, splits, MOMENTUM, EPS)
            x = x._replace(residual=tensors["residual"] if kind == "residual" else None)
        pending, applied = op.pointwise(x, tensors["matrix"], after, splits, MOMENTUM, EPS)
        assert (applied is not None) == (kind == "residual")
        y = op.finish(pending._replace(residual=tensors["last_residual"]))
        return (y, applied) if kind == "residual" else (y,)

    return run


def run(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: dict[str, Tensor],
    splits: int,
    kind: str,
    device: str = "cpu",
    wide: bool = False,
) -> dict[str, Tensor]:
    """Results, gradients and statistics, in float64 on the CPU."""
    own: dict[str, Any] = {}
    for name, tensor in tensors.items():
        tensor = (tensor.double() if wide else tensor).clone().to(device)
        own[name] = tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        if "running" not in name and "grad" not in name:
            own[name] = torch.nn.Parameter(own[name])
    results = function(own, splits, kind)
    torch.autograd.backward(results, [own["grad"], own["applied_grad"]][: len(results)])
    found = {f"result {i}": result for i, result in enumerate(results)}
    found |= {name: tensor for name, tensor in own.items() if "running" in name}
    found |= {f"{name}.grad": tensor.grad for name, tensor in own.items() if tensor.grad is not None}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("kind", ["plain", "pending", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_equals_the_plain_version(fused: ModuleType, shape: Shape, kind: str) -> None:
    tensors = settled(inputs(shape, torch.float32), shape.splits, kind)
    exact = run(plain, tensors, shape.splits, kind, wide=True)
    found = run(fused_with(fused), tensors, shape.splits, kind, DEVICE)
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        assert relative(found[name], truth) <= 1e-5, name


@pytest.mark.parametrize("kind", ["pending", "residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits_is_no_larger_than_eager(fused: ModuleType, dtype: torch.dtype, kind: str) -> None:
    # Triton's interpreter cuts bfloat16 off where a device rounds it: twice the error of a result, and it moves means.
    cut_off = DEVICE == "cpu" and dtype == torch.bfloat16
    slack, floor = (2.5, 1e-3) if cut_off else (1.25, 1e-4)
    tensors = settled(inputs(Shape(8, 24, 5, 40, 2), dtype), 2, kind)
    exact = run(plain, tensors, 2, kind, wide=True)
    eager = run(plain, tensors, 2, kind)
    found = run(fused_with(fused), tensors, 2, kind, DEVICE)
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        assert relative(found[name], truth) <= slack * relative(eager[name], truth) + floor, name


def test_statistics_are_those_of_the_rounded_output(fused: ModuleType) -> None:
    """With a mean far larger than the spread, where E[x²] − E[x]² has no digits left, and so has rounding's error."""
    tensors = inputs(Shape(4, 16, 21, 16, 2), torch.float16, offset=300.0)
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    before = tensors["running_var"].double().cpu()
    norm = fused.Norm(*(tensors[name] for name in NORMS))
    pending, _ = fused.pointwise(tensors["x"], tensors["matrix"], norm, 2, MOMENTUM, EPS)
    groups = pending.y.double().cpu().unflatten(0, (2, -1))
    truth = groups.mean((1, 3, 4)), (groups.var((1, 3, 4), correction=0) + EPS).rsqrt()
    assert relative(pending.mean.cpu().double(), truth[0]) <= 1e-6
    assert relative(pending.scale.cpu().double(), truth[1]) <= 1e-5
    variance = groups.var((1, 3, 4), correction=1).mean(0)
    expected = (1 - MOMENTUM) * before + MOMENTUM * variance
    assert relative(norm.running_var.cpu().double(), expected) <= 1e-5


@pytest.mark.parametrize("uses", ["both", "second"])
def test_two_uses_of_the_output_have_their_gradients_added(fused: ModuleType, uses: str) -> None:
    tensors = settled(inputs(Shape(4, 16, 5, 24, 2), torch.float32), 2, "plain")

    def twice(own: dict[str, Tensor], splits: int, kind: str) -> tuple[Tensor]:
        norm = fused.Norm(*(own[name] for name in NORMS))
        pending, _ = fused.pointwise(own["x"], own["matrix"], norm, splits, MOMENTUM, EPS)
        y, again = fused.finish(pending._replace(residual=own["last_residual"]), twice=True)
        assert torch.equal(y, again)
        # run() passes one gradient to the sum: those of the two uses differ by the factor 2
        return (y + 2 * again if uses == "both" else again,)

    found = run(twice, tensors, 2, "plain", DEVICE)
    factor = 3 if uses == "both" else 1
    exact = run(plain, tensors | {"grad": factor * tensors["grad"]}, 2, "plain", wide=True)
    for name in exact:
        if name.endswith(".grad"):
            assert relative(found[name], exact[name]) <= 1e-5, name


@pytest.mark.parametrize("use", [0, 1], ids=["convolution", "other"])
def test_one_use_of_an_input_with_a_residual(fused: ModuleType, use: int) -> None:
    """Only the convolution's result, or only the activation itself, has a gradient."""
    tensors = settled(inputs(Shape(4, 16, 5, 24, 2), torch.float32), 2, "residual")

    keep = "grad" if use == 0 else "applied_grad"
    exact, found = (
        run(lambda *a, f=f: (f(*a)[use],), tensors | {"grad": tensors[keep]}, 2, "residual", device, wide)
        for f, device, wide in ((plain, "cpu", True), (fused_with(fused), DEVICE, False))
    )
    for name in ("x.grad", "residual.grad", "before_weight.grad", "before_bias.grad"):
        assert relative(found[name], exact[name]) <= 1e-5, name


def test_no_gradient_is_computed_that_nobody_needs(fused: ModuleType) -> None:
    """An input that needs none, and a forward without gradients, as that of the key encoder."""
    tensors = settled(inputs(Shape(4, 16, 4, 16, 2), torch.float32), 2, "plain")
    exact = run(plain, tensors, 2, "plain", wide=True)
    tensors = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    matrix = tensors["matrix"].clone().requires_grad_()
    (y,) = fused_with(fused)(tensors | {"matrix": matrix}, 2, "plain")
    y.backward(tensors["grad"])
    assert tensors["x"].grad is None
    assert matrix.grad is not None
    assert relative(matrix.grad.double().cpu(), exact["matrix.grad"]) <= 1e-5
    with torch.no_grad():
        (again,) = fused_with(fused)(tensors, 2, "plain")
    assert not again.requires_grad
    assert torch.equal(again, y)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_are_registered_as_torch_expects(fused: ModuleType, kind: str) -> None:
    tensors = {name: tensor.to(DEVICE) for name, tensor in inputs(Shape(4, 16, 3, 20, 2), torch.float32).items()}
    tensors = {n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in tensors.items()}
    ops, tests = torch.ops.fastmoco, ("test_schema", "test_faketensor")

    def check(operator: Any, *arguments: Any) -> Any:
        results = torch.library.opcheck(operator.default, arguments, test_utils=tests)
        assert results == dict.fromkeys(tests, "SUCCESS")
        return operator(*arguments)

    x, matrix, empty = tensors["x"], tensors["matrix"], torch.empty(0, device=DEVICE)
    norm, residual = (empty,) * 4, tensors["residual"] if kind == "residual" else None
    if kind != "plain":
        statistics = check(
            ops.split_statistics, x, tensors["before_running_mean"], tensors["before_running_var"], 2, MOMENTUM, EPS
        )
        norm = *statistics, tensors["before_weight"], tensors["before_bias"]
    running = tensors["running_mean"], tensors["running_var"]
    y, *statistics, applied = check(ops.pointwise, x, *norm, residual, matrix, *running, 2, MOMENTUM, EPS)
    applied = applied if kind == "residual" else None
    last = y, tensors["weight"], tensors["bias"], *statistics
    z = check(ops.batch_norm_apply, *last, True, tensors["last_residual"])
    check(ops.batch_norm_backward, *last, z, tensors["grad"], None, True)
    check(ops.pointwise_backward, tensors["grad"], None, x, *norm, matrix, applied, 2, True)


@pytest.mark.slow
def test_torch_compile_takes_it_without_a_graph_break(fused: ModuleType) -> None:
    tensors = inputs(Shape(4, 16, 3, 20, 2), torch.float32)
    function = fused_with(fused)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    exact, found = (run(f, tensors, 2, "residual", DEVICE) for f in (function, compiled))
    for name, truth in exact.items():
        assert relative(found[name], truth) <= 1e-6, name
