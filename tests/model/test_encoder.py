"""What the encoders are: torchvision's networks by name and value, scaled in width, with a head."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from fastmoco.errors import ConfigError
from fastmoco.model.encoder import build_encoder, reset_first_convolution
from fastmoco.registry import ARCHITECTURES


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_at_width_1_the_backbone_is_torchvisions(arch: str) -> None:
    torch.manual_seed(0)
    backbone = build_encoder(arch).backbone
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch)
    ours, theirs = backbone.state_dict(), model.state_dict()
    assert list(ours) == [name for name in theirs if not name.startswith("fc.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    torch.manual_seed(1)
    trained = build_encoder(arch)
    result = model.load_state_dict(trained.backbone.state_dict(), strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"]
    assert result.unexpected_keys == []
    model.fc = nn.Identity()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trained.eval().features(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_the_first_convolution_can_have_torchs_initial_weights() -> None:
    """He et al. with fan-out: √(2 / 576) = 0.059. torch's default: uniform of standard deviation 1 / √(3 · 27) = 0.111,
    as in the CIFAR demo, which replaces the layer. All other weights stay as they are."""
    torch.manual_seed(0)
    backbone = build_encoder("resnet18", stem="cifar").backbone
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    reset_first_convolution(backbone)
    assert before["conv1.weight"].std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.06)
    assert backbone.conv1.weight.std().item() == pytest.approx(81**-0.5, rel=0.06)
    changed = [name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["conv1.weight"]


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "resnext50_32x8d"])
def test_every_name_is_torchvisions_model(arch: str) -> None:
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in build_encoder(arch).backbone.state_dict().items()}
        model = {n: t.shape for n, t in torchvision.models.get_model(arch).state_dict().items()}
    assert shapes == {n: shape for n, shape in model.items() if not n.startswith("fc.")}


@pytest.mark.parametrize(("width", "millions"), [(1, 24), (2, 94), (4, 375)])
def test_wide_resnet50_has_the_published_parameters(width: int, millions: int) -> None:
    # R50, R50w2×, R50w4× as commonly reported: 24, 94 and 375 million.
    with torch.device("meta"):
        encoder = build_encoder("resnet50", width=width)
    assert round(sum(p.numel() for p in encoder.backbone.parameters()) / 1e6) == millions
    assert encoder.feature_dim == 2048 * width


def test_the_papers_resnext_which_torchvision_lacks_has_the_published_parameters() -> None:
    # RX50, 32×8d, as He et al. 2020 report it: 46 million.
    with torch.device("meta"):
        encoder = build_encoder("resnext50_32x8d")
    assert round(sum(p.numel() for p in encoder.backbone.parameters()) / 1e6) == 46
    assert encoder.feature_dim == 2048


@pytest.mark.parametrize(("arch", "features"), [("resnet18", 128), ("resnet50", 512), ("resnext50_32x4d", 512)])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_fractional_widths_scale_every_channel(arch: str, features: int, stem: str) -> None:
    encoder = build_encoder(arch, width=0.25, stem=stem, dim=32)
    x = torch.randn(2, 3, 32, 32)
    assert encoder.backbone.conv1.out_channels == 16
    assert encoder.features(x).shape == (2, features)
    assert encoder(x).shape == (2, 32)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("cifar", 32)])
def test_the_cifar_stem_keeps_the_resolution(stem: str, side: int) -> None:
    backbone = build_encoder("resnet18", width=0.125, stem=stem).backbone
    seen = []
    backbone.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].shape[-1]))
    backbone(torch.randn(2, 3, 32, 32))
    assert seen == [side]


@pytest.mark.parametrize(
    ("head", "dim", "shapes"),
    [
        ((), 128, [(128, 64)]),
        ((64,), 128, [(64, 64), (128, 64)]),
        ((100, 50), 25, [(100, 64), (50, 100), (25, 50)]),
    ],
)
def test_heads(head: tuple[int, ...], dim: int, shapes: list[tuple[int, int]]) -> None:
    encoder = build_encoder("resnet18", width=0.125, head=head, dim=dim)
    linear = [layer for layer in encoder.head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == shapes
    assert all(isinstance(layer, nn.ReLU) for layer in list(encoder.head)[1::2])
    assert isinstance(encoder.head[-1], nn.Linear)


def test_convolutions_are_channels_last() -> None:
    encoder = build_encoder("resnet18", width=0.125)
    assert encoder.get_parameter("backbone.layer1.0.conv1.weight").stride() == (72, 1, 24, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet5"}, "did you mean resnet50"),
        ({"arch": ""}, "unknown architecture ''"),
        ({"stem": "cifar10"}, "did you mean cifar"),
        ({"width": 0.3}, "multiple of 0.125"),
        ({"width": 0.0}, "multiple of 0.125"),
        ({"width": float("nan")}, "multiple of 0.125"),
        ({"arch": "resnext50_32x4d", "width": 0.125}, "0.25 or more"),
        ({"dim": 0}, "0 dimensions"),
        ({"head": (128, 0)}, r"\(128, 0\)"),
        ({"bn_splits": 0}, "splits is 0"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(**{"arch": "resnet18", **options})


@pytest.mark.parametrize(("bn_splits", "dtype"), [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_activations_computed_again_change_no_bit(bn_splits: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    outputs, forwards = [], []
    for again in (False, True):
        torch.manual_seed(0)
        encoder = build_encoder("resnet18", width=0.125, stem="cifar", bn_splits=bn_splits).train()
        encoder.backbone.checkpoint_activations = again
        calls = []
        encoder.backbone.layer3.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            y = encoder(x)
        y.float().square().sum().backward()
        outputs.append([y.detach(), *(p.grad for p in encoder.parameters()), *encoder.buffers()])
        with torch.no_grad():
            encoder(x)  # nothing to keep, so nothing to compute again
        forwards.append(len(calls))
    assert forwards == [2, 3]
    assert all(torch.equal(plain, again) for plain, again in zip(*outputs, strict=True))


def test_fewer_activations_are_kept() -> None:
    def kept(again: bool) -> int:
        encoder = build_encoder("resnet18", width=0.125, stem="cifar")
        encoder.backbone.checkpoint_activations = again
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            encoder(torch.randn(8, 3, 16, 16))
        return sum(sizes)

    assert kept(True) < kept(False) / 2


@pytest.mark.parametrize(("arch", "channels"), [("resnet18", 64), ("resnet50", 256)])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_block_computes_what_torchvisions_does(arch: str, channels: int, training: bool) -> None:
    block = build_encoder(arch).get_submodule("backbone.layer2.0").train(training)
    like = torchvision.models.get_model(arch).get_submodule("layer2.0").train(training)
    like.load_state_dict(block.state_dict())
    found = []
    for module in (block, like):
        x = torch.randn(4, channels, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = module((x, x))[0] if module is block else module(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for ours, theirs in zip(*found, strict=True):
        if ours.dim():  # not the count of batches, which ours does not keep
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
