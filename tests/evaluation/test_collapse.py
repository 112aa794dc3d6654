"""Collapse diagnosis of features with known defects."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from fastmoco.evaluation.collapse import judge

GENERATOR = torch.Generator().manual_seed(0)


def noise(count: int, dim: int) -> Tensor:
    return torch.randn(count, dim, generator=GENERATOR)


def pairs(features: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Two views of each image: its features with added noise."""
    return tuple(features + jitter * noise(*features.shape) for _ in range(2))  # type: ignore[return-value]


def test_constant_features_have_collapsed() -> None:
    constant = torch.ones(200, 16) + 1e-4 * noise(200, 16)
    diagnosis = judge(constant, *pairs(constant, 1e-4))
    assert diagnosis.state == "collapsed"
    assert "collapsed: normalised features of two images are 0.000" in diagnosis.verdict
    assert judge(torch.ones(50, 4), torch.ones(50, 4), torch.ones(50, 4)).state == "collapsed"
    assert judge(torch.zeros(50, 4), torch.zeros(50, 4), torch.zeros(50, 4)).state in ("collapsed", "few directions")


def test_features_of_low_rank_have_partly_collapsed() -> None:
    flat = noise(300, 4) @ noise(4, 64)
    diagnosis = judge(flat, *pairs(flat, 0.1))
    assert diagnosis.state == "few directions"
    assert diagnosis.effective_rank < 4.01
    assert "of 64 directions, and the means of ten classes need 9" in diagnosis.verdict
    assert judge(flat, *pairs(flat, 0.1), classes=3).state == "spread out", "three classes need two directions"
    assert "the means of 20 classes need 19" in judge(flat, *pairs(flat, 0.1), classes=20).verdict


def test_features_in_a_narrow_cone_look_untrained() -> None:
    cone = 1 + 0.1 * noise(300, 64)
    diagnosis = judge(cone, *pairs(cone, 0.02))
    assert diagnosis.state == "narrow"
    assert diagnosis.apart == pytest.approx(0.1 * math.sqrt(2), rel=0.1)


def test_views_unrelated_to_their_image() -> None:
    diagnosis = judge(noise(300, 32), noise(300, 32), noise(300, 32))
    assert diagnosis.state == "views unrelated"
    assert diagnosis.separation == pytest.approx(1, abs=0.1)


def test_spread_features_with_close_views_have_not_collapsed() -> None:
    features = noise(300, 32)
    diagnosis = judge(features, *pairs(features, 0.1))
    assert diagnosis.state == "spread out"
    assert diagnosis.separation < 0.05
    assert diagnosis.alignment == pytest.approx(2 * diagnosis.separation, rel=0.1), (
        "negative pairs are at a squared distance of 2"
    )
    assert diagnosis.apart == pytest.approx(math.sqrt(2), rel=0.02)
    assert diagnosis.most_directions == 32
    assert json.loads(json.dumps(diagnosis.as_json()))["state"] == "spread out"


def test_values_that_are_not_finite_are_rejected() -> None:
    with pytest.raises(ValueError, match="not finite"):
        judge(torch.full((4, 2), math.nan), torch.ones(4, 2), torch.ones(4, 2))
