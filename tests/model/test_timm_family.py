"""Models of timm as backbones: which are taken, their batch norm, and the same numbers as timm's own."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from torch import nn

from fastmoco.errors import BackendMissingError, ConfigError
from fastmoco.model.architectures import check_installed, identify, named_family
from fastmoco.model.batchnorm.convert import convert_batch_norm
from fastmoco.model.batchnorm.split import SplitBatchNorm2d, divide_groups
from fastmoco.model.encoder import build_encoder
from fastmoco.model.family import layout_of
from fastmoco.model.resnet import ResNetFamily
from fastmoco.model.timm_family import TimmFamily
from fastmoco.step.flat_params import FlatParameters

SMALL = ("test_resnet", "test_efficientnet", "test_convnext", "test_byobnet")
PUBLISHED = ("resnet10t", "resnet18", "regnetx_002", "efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto")
EVERY = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in (*PUBLISHED, "resnetblur18", "densenet121"))]


def images(count: int = 8, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side)


def warmed(model: nn.Module) -> nn.Module:
    """With statistics and scales that are not those of a fresh model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) if parameter.ndim == 1 or "gamma" in name else 0)
        model.train()(images())
    return model


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_split_batch_norm_is_a_forward_of_each_group(name: str) -> None:
    """Features, and the running statistics, which are the mean over the groups'."""
    theirs = warmed(timm.create_model(name, num_classes=0))
    ours = copy.deepcopy(theirs)
    normalised = convert_batch_norm(ours, partial(SplitBatchNorm2d, num_splits=2))
    assert normalised == sum(isinstance(m, nn.BatchNorm2d) for m in theirs.modules())
    assert normalised == sum(isinstance(m, SplitBatchNorm2d) for m in ours.modules())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images()
    groups = [copy.deepcopy(theirs).train() for _ in range(2)]
    expected = torch.cat([group(part) for group, part in zip(groups, x.split(4), strict=True)])
    torch.testing.assert_close(ours.train()(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    states = [group.state_dict() for group in groups]
    for key, tensor in ours.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(tensor, (states[0][key] + states[1][key]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_the_encoder_has_the_features_of_the_model_and_gradients_everywhere(name: str) -> None:
    encoder = build_encoder(f"timm/{name}", dim=8, bn_splits=2).train()
    theirs = timm.create_model(name, num_classes=0)
    assert list(encoder.backbone.state_dict()) == list(theirs.state_dict())
    encoder(images()).square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    theirs.load_state_dict(encoder.backbone.state_dict())
    with torch.no_grad():
        x = images()
        expected = theirs.eval()(x)
        assert expected.shape == (8, encoder.feature_dim)
        torch.testing.assert_close(encoder.eval().features(x), expected)


@torch.no_grad()
def test_resnet18_of_timm_is_our_resnet18() -> None:
    ours = build_encoder("resnet18", bn_splits=4).backbone
    theirs = build_encoder("timm/resnet18", bn_splits=4).backbone
    theirs.load_state_dict(ours.state_dict())
    x = images()
    for mode in (True, False):
        expected = ours.train(mode)(x)
        torch.testing.assert_close(theirs.train(mode)(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_seed_gives_the_weights_and_looking_at_a_model_draws_no_number() -> None:
    first = build_encoder("timm/test_resnet").state_dict()
    torch.manual_seed(0)
    TimmFamily.settings("timm/test_byobnet")
    TimmFamily.build("timm/test_efficientnet")
    second = build_encoder("timm/test_resnet").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_settings_are_those_of_timm() -> None:
    settings = TimmFamily.settings("timm/test_resnet")
    config = timm.get_pretrained_cfg("test_resnet")
    assert config is not None
    assert (settings.side, settings.mean, settings.std) == (config.input_size[-1], config.mean, config.std)
    assert settings.reduction == 32


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_tiny_patch16_224", "transformers need MoCo v3"),
        ("swin_tiny_patch4_window7_224", "is no convolutional network"),
        ("mixer_s32_224", "it mixes tokens"),
        ("maxvit_rmlp_pico_rw_256", "it mixes tokens"),
        ("levit_128s", "it mixes tokens"),
        ("resnet1x", "did you mean .*resnet18"),
        ("regnetx_02", "did you mean .*regnetx_002"),
    ],
)
def test_other_models_are_refused_in_one_line(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        build_encoder(f"timm/{name}")
    assert "\n" not in str(caught.value)


def test_timm_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendMissingError, match="uv sync --inexact --extra timm in a checkout, or pip install timm"):
        check_installed("timm/resnet18")
    check_installed("resnet18")


def test_files_of_a_model_are_told_from_those_of_others() -> None:
    shapes = layout_of(ResNetFamily.build("resnet34")).shapes
    with pytest.raises(ValueError, match=r"not those of timm/resnet18: .* is unexpected"):
        identify(shapes, "timm/resnet18")
    assert identify(shapes, "timm/resnet34") == ("timm/resnet34", "imagenet", 1.0)
    assert identify(shapes) == ("resnet34", "imagenet", 1.0)
    assert named_family("resnet34") is None


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm1d(4), r"BatchNorm1d \(1\), and only BatchNorm2d is split"),
        (nn.SyncBatchNorm(4), "SyncBatchNorm"),
        (OwnNorm(4), "a batch norm of its own kind, OwnNorm"),
        (nn.BatchNorm2d(4, affine=False), "no scale and shift"),
        (nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
        (nn.BatchNorm2d(4, momentum=None), "no running statistics"),
    ],
)
def test_batch_norm_that_cannot_be_split_is_named(layer: nn.Module, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        convert_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), layer), SplitBatchNorm2d)


def test_groups_are_divided_over_ranks_as_in_our_resnets() -> None:
    encoder = build_encoder("timm/test_efficientnet", bn_splits=8)

    class Two:
        size = 2

    divide_groups(encoder, Two())  # pyright: ignore[reportArgumentType]
    assert {m.num_splits for m in encoder.modules() if isinstance(m, SplitBatchNorm2d)} == {4}


def test_weights_that_a_layer_standardises_are_not_rounded_before() -> None:
    """Under autocast, the result is rounded: a convolution of NFNets computes with the weights of float32."""
    from timm.layers.std_conv import ScaledStdConv2d

    layers = nn.Sequential(ScaledStdConv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(2, 2))
    rounded = FlatParameters(layers).keep_rounded(torch.bfloat16)
    assert sorted(rounded) == ["1.bias", "1.weight", "2.bias", "2.weight"]
