"""Batch norm's kernels as operators of torch: registered rightly, and the same in compiled modules as in eager ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmoco.model.batchnorm.split import SplitBatchNorm2d, use_kernels
from fastmoco.model.resnet import BasicBlock, Bottleneck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, C, H, W, splits: ragged channels and sides, one pixel
CASES = [((6, 5, 5, 3, 3), torch.bfloat16), ((4, 16, 1, 1, 2), torch.float32)]

pytestmark = pytest.mark.any_device


@pytest.fixture(autouse=True)
def _triton(require_backend: Callable[[str], None]) -> None:
    require_backend("triton")


def rows(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(grad)


def channels(count: int, *, grad: bool = False) -> Tensor:
    return (0.5 + torch.rand(count, device=DEVICE)).requires_grad_(grad)


def statistics(x: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    groups = x.detach().float().unflatten(0, (splits, -1)).transpose(1, 2).flatten(2)
    return groups.mean(dim=2), groups.var(dim=2, correction=0).add(1e-5).rsqrt()


def assert_registered(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Schema, fake implementation and gradient are as torch expects, and it can be traced."""
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_operators_are_registered_rightly(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from fastmoco.model.batchnorm.triton import batch_norm_apply, batch_norm_backward
    from fastmoco.model.batchnorm.triton_plan import split_statistics

    *sides, splits = shape
    count = sides[1]
    x, residual, grad, second = (rows(*sides, dtype=dtype) for _ in range(4))
    assert_registered(split_statistics.operator, (x, channels(count), channels(count), splits, 0.1, 1e-5))
    found = statistics(x, splits)
    for relu in (False, True):
        for more in (None, residual.clone().requires_grad_()):
            leaves = x.clone().requires_grad_(), channels(count, grad=True), channels(count, grad=True)
            assert_registered(batch_norm_apply.operator, (*leaves, *found, relu, more))
    weight, bias = channels(count), channels(count)
    for y in (None, residual.relu()):
        for again in (None, second):
            assert_registered(batch_norm_backward.operator, (x, weight, bias, *found, y, grad, again, True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_operators_with_pooling_are_registered_rightly(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from fastmoco.model.batchnorm.triton_pool import batch_norm_pool, batch_norm_pool_backward

    samples, count, height, width, splits = shape
    x = rows(samples, count, height, width, dtype=dtype)
    weight, bias, found = channels(count), channels(count), statistics(x, splits)
    leaves = x.clone().requires_grad_(), channels(count, grad=True), channels(count, grad=True)
    assert_registered(batch_norm_pool.operator, (*leaves, *found, True))
    assert_registered(batch_norm_pool.operator, (x, weight, bias, *found, False))
    _, tap = batch_norm_pool.operator(x, weight, bias, *found, True)
    grad, second = (rows(*tap.shape, dtype=dtype) for _ in range(2))
    for again in (None, second):
        assert_registered(batch_norm_pool_backward.operator, (x, weight, *found, tap, grad, again))


def test_the_gradient_of_an_operator_is_that_of_the_function() -> None:
    """`register_autograd`, which plain calls of the operators use, against the layer's own way to it."""
    from fastmoco.model.batchnorm import triton, triton_pool

    x, weight, bias = rows(6, 5, 5, 3), channels(5), channels(5)
    found = statistics(x, 3)
    batch_norm: Any = triton.split_batch_norm
    batch_norm_pool: Any = triton_pool.split_batch_norm_pool
    for residual in (None, rows(6, 5, 5, 3)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        more = None if residual is None else residual.clone().requires_grad_()
        y = triton.batch_norm_apply.operator(*leaves, *found, True, more)
        grad = rows(*y.shape)
        wanted_leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        wanted_more = None if residual is None else residual.clone().requires_grad_()
        buffers = channels(5), channels(5)
        wanted = batch_norm(*wanted_leaves, *buffers, 3, 0.1, 1e-5, True, wanted_more)
        torch.testing.assert_close(y, wanted)
        y.backward(grad)
        wanted.backward(grad)
        for ours, theirs in zip([*leaves, more], [*wanted_leaves, wanted_more], strict=True):
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours.grad, theirs.grad)
    leaves, wanted_leaves = ([t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2))
    y, _ = triton_pool.batch_norm_pool.operator(*leaves, *found, True)
    wanted, _ = batch_norm_pool(*wanted_leaves, channels(5), channels(5), 3, 0.1, 1e-5)
    torch.testing.assert_close(y, wanted)
    grad = rows(*y.shape)
    y.backward(grad)
    wanted.backward(grad)
    for ours, theirs in zip(leaves, wanted_leaves, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class Stem(nn.Module):
    """Pooling, a block, and one use of its output: the gradient of the other is missing."""

    def __init__(self, block: type[BasicBlock | Bottleneck]) -> None:
        super().__init__()

        def norm(count: int) -> SplitBatchNorm2d:
            return SplitBatchNorm2d(count, 2)

        width = 4 * block.expansion
        self.bn = norm(8)
        downsample = nn.Sequential(nn.Conv2d(8, width, 1, 2, bias=False), norm(width))
        self.block = block(8, 4, 2, downsample, norm_layer=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.bn(x, relu=True, pool=True))[0].mean(dim=(2, 3))


class Counted:
    """A backend that counts the calls of our operators in the graphs that it is given."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __call__(self, graph: Any, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            name = str(node.target)
            if name.startswith("fastmoco.") or "auto_functionalized" in name:
                name = str(node.args[0]) if "auto_functionalized" in name else name
                self.calls[name.split(".")[1]] = self.calls.get(name.split(".")[1], 0) + 1
        return graph


@pytest.mark.slow
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_compiled_module_is_the_eager_one(block: type[BasicBlock | Bottleneck]) -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    counted = Counted()
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(counted(graph, inputs)))
    torch.manual_seed(0)
    eager = Stem(block).to(DEVICE)
    use_kernels(eager, "triton")
    torch.manual_seed(0)
    compiled = Stem(block).to(DEVICE)
    use_kernels(compiled, "triton")
    call = torch.compile(compiled, backend=backend, fullgraph=True, dynamic=False)
    x = rows(4, 8, 6, 6)
    found = []
    for function, module in ((eager, eager), (call, compiled)):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        with torch.no_grad():
            again = function(x)
        found.append([y, again, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    norms = 3 + (block is Bottleneck)  # of a block with a shortcut
    # Forward, backward, and forward without gradients.
    assert counted.calls == {
        "split_statistics": 2 * (norms + 1),
        "batch_norm_apply": 2 * norms,
        "batch_norm_pool": 2,
        "batch_norm_backward": norms,
        "batch_norm_pool_backward": 1,
    }
