"""The fused InfoNCE against cross entropy over all logits in float64, in loss and gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

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


def test_queries_of_16_bits_meet_a_float32_queue_in_float32(fused: ModuleType) -> None:
    q, k, queue = embeddings(9, 50, 32)
    tensors = q.bfloat16(), k, queue
    exact = loss_and_gradient(cross_entropy, tuple(t.double() for t in tensors))
    loss, grad = loss_and_gradient(fused.info_nce, tuple(t.to(DEVICE) for t in tensors))
    assert relative(loss, exact[0]) <= 2e-6
    assert relative(grad, exact[1]) <= 2**-8  # the gradient has the queries' type


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
