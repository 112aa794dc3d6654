"""The verdict on features of which one knows what is wrong with them."""

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
    """Two views of each image: its features, moved a little."""
    return tuple(features + jitter * noise(*features.shape) for _ in range(2))  # type: ignore[return-value]


def test_features_of_images_that_are_all_the_same_have_collapsed() -> None:
    constant = torch.ones(200, 16) + 1e-4 * noise(200, 16)
    found = judge(constant, *pairs(constant, 1e-4))
    assert found.state == "collapsed"
    assert "collapsed: any two images are 0.000" in found.verdict
    assert judge(torch.ones(50, 4), torch.ones(50, 4), torch.ones(50, 4)).state == "collapsed"
    assert judge(torch.zeros(50, 4), torch.zeros(50, 4), torch.zeros(50, 4)).state in ("collapsed", "few directions")


def test_features_of_too_few_directions_have_collapsed_in_part() -> None:
    flat = noise(300, 4) @ noise(4, 64)
    found = judge(flat, *pairs(flat, 0.1))
    assert found.state == "few directions"
    assert found.effective_rank < 4.01
    assert "of 64 directions, and the means of ten classes need 9" in found.verdict
    assert judge(flat, *pairs(flat, 0.1), classes=3).state == "spread out", "three classes need two directions"
    assert "the means of 20 classes need 19" in judge(flat, *pairs(flat, 0.1), classes=20).verdict


def test_features_in_a_narrow_cone_are_as_of_an_untrained_network() -> None:
    cone = 1 + 0.1 * noise(300, 64)
    found = judge(cone, *pairs(cone, 0.02))
    assert found.state == "narrow"
    assert found.apart == pytest.approx(0.1 * math.sqrt(2), rel=0.1)


def test_views_that_tell_nothing_of_their_image() -> None:
    found = judge(noise(300, 32), noise(300, 32), noise(300, 32))
    assert found.state == "views unrelated"
    assert found.separation == pytest.approx(1, abs=0.1)


def test_spread_features_with_close_views_are_well() -> None:
    features = noise(300, 32)
    found = judge(features, *pairs(features, 0.1))
    assert found.state == "spread out"
    assert found.separation < 0.05
    assert found.alignment == pytest.approx(2 * found.separation, rel=0.1), "far pairs are at a squared distance of 2"
    assert found.apart == pytest.approx(math.sqrt(2), rel=0.02)
    assert found.most_directions == 32
    assert json.loads(json.dumps(found.as_json()))["state"] == "spread out"


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        judge(torch.full((4, 2), math.nan), torch.ones(4, 2), torch.ones(4, 2))
