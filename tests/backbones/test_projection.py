"""The projection head is rebuilt from its tensors where it is one of MoCo's, and left out where it is another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmoco.backbones.projection import projection_head
from fastmoco.model.encoder import build_encoder


@pytest.mark.parametrize("hidden", [(), (24,), (24, 12)])
def test_it_is_the_head_of_the_encoder(hidden: tuple[int, ...]) -> None:
    encoder = build_encoder("resnet18", width=0.125, stem="cifar", head=hidden, dim=16)
    found = projection_head(encoder.head.state_dict(), encoder.feature_dim)
    x = torch.randn(5, encoder.feature_dim)
    assert found is not None
    assert torch.equal(found(x), encoder.head(x))
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_one_layer_without_a_number_is_that_of_moco_v1() -> None:
    layer = nn.Linear(8, 4)
    found = projection_head(layer.state_dict(), 8)
    assert found is not None
    assert torch.equal(found(torch.ones(1, 8)), layer(torch.ones(1, 8)))


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(),
        nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 4)),
        nn.Sequential(nn.ReLU(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(7, 4)),
        nn.Sequential(nn.Conv2d(8, 4, 1)),
    ],
    ids=["none", "batch norm", "another spacing", "an activation first", "other features", "a convolution"],
)
def test_another_head_is_none(head: nn.Sequential) -> None:
    assert projection_head(head.state_dict(), 8) is None
