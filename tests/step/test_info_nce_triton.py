"""The fused InfoNCE against cross entropy over all logits in float64, in loss and gradient.

With exact products, as torch is set in tests; with operands rounded to float16, as it is set by default, where
`tensor_cores` is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.step.info_nce import info_nce

pytestmark = [pytest.mark.any_device, pytest.mark.usefixtures("poisoned_memory")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEMPERATURE = 0.2


@pytest.fixture
def fused(require_backend: Callable[[str], None]) -> ModuleType:
    require_backend("triton")
    from fastmoco.step import info_nce_triton

    return info_nce_triton


@pytest.fixture
def precisions() -> Iterator[Callable[[str, str], None]]:
    """Sets the precision of torch's convolutions and matrix products, for one test."""
    cudnn: Any = torch.backends.cudnn
    settings: list[Any] = [cudnn.conv, torch.backends.cuda.matmul]
    before = [setting.fp32_precision for setting in settings]

    def set_all(*values: str) -> None:
        for setting, value in zip(settings, values, strict=True):
            setting.fp32_precision = value

    yield set_all
    set_all(*before)


@pytest.fixture
def tensor_cores(precisions: Callable[[str, str], None]) -> None:
    precisions("tf32", "ieee")


def embeddings(n: int, k: int, channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys that resemble them, and a queue: fresh numbers in every run."""
    q = F.normalize(torch.randn(n, channels), dim=1)
    keys = F.normalize(q + 0.5 * F.normalize(torch.randn(n, channels), dim=1), dim=1)
    queue = F.normalize(torch.randn(k, channels), dim=1)
    return q.to(dtype), keys.to(dtype), queue.to(dtype)


def cross_entropy(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def loss_and_gradient(
    loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor]:
    q, k, queue = (t.detach().clone() for t in tensors)
    value = loss(q.requires_grad_(), k, queue, temperature)
    (3.0 * value).backward()
    assert q.grad is not None
    return value.detach().double().cpu(), q.grad.double().cpu()


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("n", "k", "channels"),
    [(1, 1, 25), (7, 123, 25), (7, 123, 128), (70, 64, 128), (33, 1024, 16), (5, 700, 256)],
    ids=lambda v: str(v),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_no_larger_than_eager(fused: ModuleType, n: int, k: int, channels: int, dtype: torch.dtype) -> None:
    tensors = embeddings(n, k, channels, dtype)
    exact = loss_and_gradient(cross_entropy, tuple(t.double() for t in tensors))
    eager = loss_and_gradient(cross_entropy, tensors)
    found = loss_and_gradient(fused.info_nce, tuple(t.to(DEVICE) for t in tensors))
    for value, by_eager, truth in zip(found, eager, exact, strict=True):
        assert relative(value, truth) <= relative(by_eager, truth) + (2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.slow
def test_a_full_queue(fused: ModuleType) -> None:
    tensors = embeddings(252 if DEVICE == "cuda" else 7, 65536, 128)
    exact = loss_and_gradient(cross_entropy, tuple(t.double() for t in tensors))
    found = loss_and_gradient(fused.info_nce, tuple(t.to(DEVICE) for t in tensors))
    for value, truth in zip(found, exact, strict=True):
        assert relative(value, truth) <= 5e-6


def test_agrees_with_the_plain_loss_under_autocast(fused: ModuleType) -> None:
    q, k, queue = embeddings(12, 90, 64)
    expected = loss_and_gradient(info_nce, (q, k, queue))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = loss_and_gradient(fused.info_nce, (q.to(DEVICE), k.to(DEVICE), queue.to(DEVICE)))
    for value, other in zip(found, expected, strict=True):
        assert relative(value, other) <= 2e-6


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("queue_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("q_dtype", FLOATS, ids=str)
def test_types_may_differ(fused: ModuleType, q_dtype: torch.dtype, queue_dtype: torch.dtype) -> None:
    q, k, queue = embeddings(9, 50, 32)
    tensors = q.to(q_dtype), k, queue.to(queue_dtype)
    if q_dtype == torch.float32:
        exact = loss_and_gradient(cross_entropy, tuple(t.double() for t in tensors))
        loss, grad = loss_and_gradient(fused.info_nce, tuple(t.to(DEVICE) for t in tensors))
        assert relative(loss, exact[0]) <= 2e-6
        assert relative(grad, exact[1]) <= 2e-6
    else:
        check_rounded(fused, tensors, TEMPERATURE)


def rounded_loss_and_gradient(tensors: tuple[Tensor, ...], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, with negatives of operands rounded to float16: losses (N,), gradient of their mean, sigmoids (N,)."""
    q, k, queue = (t.double() for t in tensors)
    rounded_q, rounded_queue = q.half().double(), queue.half().double()
    logits = rounded_q @ rounded_queue.T / temperature
    gap = logits.logsumexp(dim=1) - (q * k).sum(dim=1) / temperature
    mean = logits.softmax(dim=1) @ rounded_queue
    grad = gap.sigmoid()[:, None] * (mean - k) / temperature / len(q)
    return F.softplus(gap), grad, gap.sigmoid()


def check_rounded(fused: ModuleType, tensors: tuple[Tensor, ...], temperature: float) -> None:
    """The loss has the rounding of operands only; the gradient also that of weights and of partial means.

    Each of these is at most 2^-11 of a weighted mean of unit vectors, scaled by the gradient's sigmoid(gap) / τ.
    """
    losses, wanted, sigmoid = rounded_loss_and_gradient(tensors, temperature)
    loss, grad = loss_and_gradient(fused.info_nce, tuple(t.to(DEVICE) for t in tensors), temperature)
    # float32: products of unit vectors within 1e-7 of themselves, as log-sum-exp takes them
    float32 = 2e-7 / temperature
    assert (loss - losses.mean()).abs() <= 2e-6 * losses.mean() + float32
    last_bit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(tensors[0].dtype, 0.0)
    allowed = (2**-10 + 2 * float32) * sigmoid / temperature / len(losses) + last_bit * wanted.norm(dim=1) + 1e-7
    assert ((grad / 3.0 - wanted).norm(dim=1) <= allowed).all()
    exact = loss_and_gradient(info_nce, tuple(t.double() for t in tensors), temperature)[0]
    assert (loss - exact).abs() <= 2**-10 / temperature + 2e-6 * exact + float32


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize(
    ("n", "k", "channels"),
    [
        (1, 1, 16),
        (7, 123, 20),
        (20, 64, 64),
        pytest.param(130, 140, 32, marks=pytest.mark.slow),
        (5, 1024, 128),
        (5, 700, 256),
        (3, 90, 520),
    ],
    ids=lambda v: str(v),
)
def test_negatives_on_tensor_cores_lose_no_more_than_11_bits_do(
    fused: ModuleType, n: int, k: int, channels: int
) -> None:
    check_rounded(fused, embeddings(n, k, channels), TEMPERATURE)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("queue_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("q_dtype", FLOATS, ids=str)
def test_types_may_differ_on_tensor_cores(fused: ModuleType, q_dtype: torch.dtype, queue_dtype: torch.dtype) -> None:
    q, k, queue = embeddings(19, 200, 48)
    check_rounded(fused, (q.to(q_dtype), k, queue.to(queue_dtype)), TEMPERATURE)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("temperature", [1e-3, 0.02, 20.0])
def test_extreme_temperatures_on_tensor_cores(fused: ModuleType, temperature: float) -> None:
    q, _, queue = embeddings(6, 277, 32)
    check_rounded(fused, (q, q.roll(1, dims=0), queue), temperature)


@pytest.mark.usefixtures("tensor_cores")
def test_weights_below_the_range_of_float16_count(fused: ModuleType) -> None:
    """One key is e²⁰ times as heavy as each of 4,000 others: e⁻²⁰ is less than half of the smallest float16."""
    unit = torch.eye(16)
    tensors = unit[:1], unit[1:2], torch.cat([unit[:1], unit[2:3].repeat(4000, 1)])
    exact = loss_and_gradient(cross_entropy, tuple(t.double() for t in tensors), 0.05)
    found = loss_and_gradient(fused.info_nce, tuple(t.to(DEVICE) for t in tensors), 0.05)
    assert exact[1][0, 2] > 0
    assert relative(found[1][0, 2], exact[1][0, 2]) <= 0.01


@pytest.mark.parametrize(
    ("convolutions", "products", "rounds"),
    [("ieee", "ieee", False), ("none", "none", False), ("tf32", "ieee", True), ("ieee", "tf32", True)],
)
def test_products_are_exact_where_torch_is_set_to_be(
    fused: ModuleType, precisions: Callable[[str, str], None], convolutions: str, products: str, rounds: bool
) -> None:
    precisions(convolutions, products)
    tensors = embeddings(8, 64, 16)
    exact = loss_and_gradient(cross_entropy, tuple(t.double() for t in tensors))[1]
    found = loss_and_gradient(fused.info_nce, tuple(t.to(DEVICE) for t in tensors))[1]
    assert (relative(found, exact) > 5e-6) == rounds


def test_a_tiny_loss_keeps_its_digits(fused: ModuleType) -> None:
    """At a temperature of 0.05 a found key is e³⁰ more likely than the rest: 1 + e⁻³⁰ is 1 in float32."""
    q = F.normalize(torch.randn(3, 16), dim=1)
    tensors = q, q.clone(), -0.5 * q[:1].repeat(40, 1) - 0.5 * q[1:2] - 0.5 * q[2:]
    exact = loss_and_gradient(info_nce, tuple(t.double() for t in tensors), 0.05)
    found = loss_and_gradient(fused.info_nce, tuple(t.to(DEVICE) for t in tensors), 0.05)
    assert 0 < exact[0] < 1e-6
    assert relative(found[0], exact[0]) <= 1e-4
    assert relative(found[1], exact[1]) <= 1e-4


def test_large_logits_do_not_overflow(fused: ModuleType) -> None:
    q, _, queue = embeddings(6, 77, 32)
    tensors = q, q.roll(1, dims=0), queue
    exact = loss_and_gradient(cross_entropy, tuple(t.double() for t in tensors), 1e-3)
    found = loss_and_gradient(fused.info_nce, tuple(t.to(DEVICE) for t in tensors), 1e-3)
    assert exact[0] > 100
    for value, truth in zip(found, exact, strict=True):
        assert relative(value, truth) <= 1e-3


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "queue"])
def test_not_a_number_comes_through(fused: ModuleType, which: int) -> None:
    """The step skips what is not finite: a kernel that hid it would train on rubbish."""
    tensors = embeddings(5, 40, 16)
    tensors[which][3, 2] = float("nan")
    with torch.no_grad():
        assert fused.info_nce(*(t.to(DEVICE) for t in tensors), TEMPERATURE).isnan()


def test_keys_that_ask_for_a_gradient_are_refused(fused: ModuleType) -> None:
    q, k, queue = (t.to(DEVICE) for t in embeddings(2, 5, 16))
    with pytest.raises(AssertionError):
        fused.info_nce(q, k.requires_grad_(), queue, TEMPERATURE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # in opcheck
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_keeps_the_rules_of_torch(fused: ModuleType, q_dtype: torch.dtype) -> None:
    """Schema, fake implementation, registered gradient, and tracing with static and dynamic shapes."""
    q, k, queue = (t.to(DEVICE) for t in embeddings(5, 40, 16))
    arguments = q.to(q_dtype).requires_grad_(), k, queue, TEMPERATURE
    results = torch.library.opcheck(torch.ops.fastmoco.info_nce.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.slow
def test_it_compiles_into_one_graph(fused: ModuleType) -> None:
    def loss(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
        return 2.0 * fused.info_nce(F.normalize(q, dim=1), k, queue, temperature)

    tensors = tuple(t.to(DEVICE) for t in embeddings(6, 50, 16))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss_and_gradient(loss, tensors), loss_and_gradient(compiled, tensors)
    for value, other in zip(found, expected, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(value, other, rtol=0, atol=0)


def test_a_second_derivative_is_refused(fused: ModuleType) -> None:
    q, k, queue = (t.to(DEVICE) for t in embeddings(2, 5, 16))
    loss = fused.info_nce(q.requires_grad_(), k, queue, TEMPERATURE)
    (grad,) = torch.autograd.grad(loss * loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.gpu
def test_replays_in_a_cuda_graph_on_fresh_inputs(fused: ModuleType) -> None:
    q, k, queue = (t.to(DEVICE) for t in embeddings(64, 4096, 128))
    q.requires_grad_()
    q.grad = torch.zeros_like(q)

    def step() -> Tensor:
        assert q.grad is not None
        q.grad.zero_()
        loss = fused.info_nce(q, k, queue, TEMPERATURE)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    fresh = embeddings(64, 4096, 128)
    with torch.no_grad():
        for tensor, new in zip((q, k, queue), fresh, strict=True):
            tensor.copy_(new)
    graph.replay()
    exact = loss_and_gradient(cross_entropy, tuple(t.double() for t in fresh))
    assert relative(loss.detach().double().cpu(), exact[0]) <= 5e-6
    assert relative(3.0 * q.grad.double().cpu(), exact[1]) <= 5e-6
