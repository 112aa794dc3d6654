"""Alignment, uniformity and effective rank against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from fastmoco.evaluation import geometry as module
from fastmoco.evaluation.geometry import alignment, effective_rank, uniformity

CROSS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])


def test_alignment_of_equal_orthogonal_and_opposite_pairs() -> None:
    q = 5 * torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])  # the norm must not matter
    k = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert alignment(q, q) == 0
    assert alignment(q, k) == pytest.approx((0 + 2 + 4) / 3)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_uniformity_of_four_points_on_a_circle(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 of the 6 pairs have squared distance 2, the others 4."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert uniformity(3 * CROSS) == pytest.approx(math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6))
    assert uniformity(CROSS, t=0.5) == pytest.approx(math.log((4 * math.exp(-1) + 2 * math.exp(-2)) / 6))


def test_uniformity_of_a_collapsed_and_of_a_random_representation() -> None:
    assert uniformity(torch.ones(50, 8)) == pytest.approx(0, abs=1e-12)
    spread = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
    assert uniformity(spread) == pytest.approx(-4, abs=0.1)  # distances concentrate at 2: exp(-2 · 2)
    assert uniformity(spread.bfloat16()) == pytest.approx(uniformity(spread), abs=0.01)


def test_uniformity_is_minus_infinity_where_the_potential_vanishes() -> None:
    assert uniformity(CROSS, t=1e6) == -math.inf


def test_effective_rank_counts_the_directions() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 3)) == 0
    # singular values 3 and 1: p = 3/4, 1/4; exp(entropy) = 4 / 3^(3/4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)


def test_invalid_shapes_and_values_are_rejected() -> None:
    with pytest.raises(ValueError, match="pairs"):
        alignment(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="2 embeddings"):
        uniformity(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="finite"):
        effective_rank(torch.tensor([[math.nan]]))
