"""The loss is the cross entropy of finding the positive among the negatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.step.info_nce import info_nce


def unit(n: int, c: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def cross_entropy(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def test_a_loss_computed_by_hand() -> None:
    # q·k = 1, q·queue = (0, −1), τ = 1: −log(e / (e + 1 + 1/e)).
    q = torch.tensor([[1.0, 0.0]])
    queue = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert info_nce(q, q, queue, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)))


@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.2, 1.0])
@pytest.mark.parametrize(("n", "c", "size"), [(1, 2, 1), (7, 16, 33), (32, 128, 256)])
def test_it_is_cross_entropy_in_value_and_gradient(n: int, c: int, size: int, temperature: float) -> None:
    q, k, queue = unit(n, c, 0).requires_grad_(), unit(n, c, 1), unit(size, c, 2)
    found, expected = info_nce(q, k, queue, temperature), cross_entropy(q, k, queue, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    (gradient,), (wanted,) = torch.autograd.grad(found, q), torch.autograd.grad(expected, q)
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-8)


def test_float32_is_no_worse_than_eager_cross_entropy() -> None:
    q, k, queue = unit(64, 128, 0), unit(64, 128, 1), unit(4096, 128, 2)
    k = F.normalize(q + 0.3 * k, dim=1)
    exact = cross_entropy(q, k, queue, 0.07)
    single = (q.float(), k.float(), queue.float(), 0.07)
    assert (info_nce(*single) - exact).abs() <= (cross_entropy(*single) - exact).abs() + 1e-6


def test_a_tiny_loss_keeps_its_digits() -> None:
    # The positive wins by 2/0.1 = 20: the loss is e^−20, which 1 − p rounds to 0 in float32.
    q = torch.tensor([[1.0, 0.0]])
    assert info_nce(q, q, -q, 0.1).item() == pytest.approx(math.exp(-20), rel=1e-4)


def test_autocast_does_not_lower_it() -> None:
    q, k, queue = unit(8, 64, 0).float().requires_grad_(), unit(8, 64, 1).float(), unit(128, 64, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce(q, k, queue, 0.07)
    assert found.dtype == torch.float32
    assert torch.equal(found, info_nce(q, k, queue, 0.07))


def test_gradient_reaches_the_key_only_where_it_is_asked_for() -> None:
    q, k, queue = unit(4, 8, 0).requires_grad_(), unit(4, 8, 1), unit(16, 8, 2)
    info_nce(q, k, queue, 0.2).backward()
    assert q.grad is not None
    assert k.grad is None
    assert queue.grad is None
