"""An encoder: a torchvision ResNet as the backbone, and a projection head.

B batch · S side of a view · D features of the backbone · C embedding
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

from fastmoco.errors import ConfigError
from fastmoco.model.architectures import STEMS
from fastmoco.model.batchnorm.split import SplitBatchNorm2d, freeze_running_stats


class BasicBlock(resnet.BasicBlock):
    """torchvision's block, with ReLU and residual sum handed to the batch norm before them."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), relu=True)
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn2(self.conv2(y), relu=True, residual=identity)


class Bottleneck(resnet.Bottleneck):
    """torchvision's block, with ReLU and residual sum handed to the batch norm before them."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        identity = x if self.downsample is None else self.downsample(x)
        return self.bn3(self.conv3(y), relu=True, residual=identity)


class _Shape(NamedTuple):
    block: type[BasicBlock | Bottleneck]
    layers: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64


ARCHITECTURES = {
    "resnet18": _Shape(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _Shape(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _Shape(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _Shape(Bottleneck, (3, 4, 23, 3)),
    "resnet152": _Shape(Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": _Shape(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext50_32x8d": _Shape(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=8),  # of the MoCo paper
    "resnext101_32x8d": _Shape(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": _Shape(Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4),
    "wide_resnet50_2": _Shape(Bottleneck, (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": _Shape(Bottleneck, (3, 4, 23, 3), width_per_group=128),
}
_STEM_CHANNELS = 64  # of every torchvision ResNet at width 1


class Backbone(resnet.ResNet):
    """torchvision's ResNet without its classifier: (B, 3, S, S) → (B, feature_dim).

    Every channel count is multiplied by `width`. `stem="cifar"` has a 3×3 convolution of stride 1 and no pooling
    (He et al. 2016, section 4.2). Parameter names, order and initialisation are torchvision's, so at width 1 with the
    ImageNet stem its state loads into torchvision's model, which then misses `fc.weight` and `fc.bias` only.

    With `checkpoint_activations` a forward that will be differentiated keeps only what enters each of the four stages,
    and the backward repeats a stage to get the rest: gradients and statistics are the same bit for bit, for about a
    third more arithmetic (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """

    def __init__(self, shape: _Shape, *, width: float, stem: str, bn_splits: int) -> None:
        self.width = width  # read by `_make_layer`, which torchvision's constructor calls
        norm_layer = partial(SplitBatchNorm2d, num_splits=bn_splits)
        super().__init__(
            shape.block,
            list(shape.layers),
            groups=shape.groups,
            width_per_group=shape.width_per_group,
            norm_layer=norm_layer,
        )
        if stem == "cifar" or width != 1:
            channels = round(_STEM_CHANNELS * width)
            kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
            self.conv1 = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
            self.bn1 = norm_layer(channels)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if stem == "cifar":
            self.maxpool = nn.Identity()
        self.feature_dim = _feature_dim(shape, width)
        self.fc = nn.Identity()
        self.checkpoint_activations = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = _recomputed(stage, x) if self.checkpoint_activations and torch.is_grad_enabled() else stage(x)
        return self.avgpool(x).flatten(1)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == _STEM_CHANNELS:
            self.inplanes = round(_STEM_CHANNELS * self.width)
        return super()._make_layer(block, round(planes * self.width), blocks, stride, dilate)


def _recomputed(stage: nn.Module, x: Tensor) -> Tensor:
    """stage(x), whose activations are computed again when the backward needs them."""
    return checkpoint(
        stage,
        x,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing here draws; and reading its state is refused in a CUDA graph
        context_fn=lambda: (nullcontext(), freeze_running_stats(stage)),
    )


class Encoder(nn.Module):
    """A view in, an embedding out.

    `head` is a list of linear layers with ReLU between them: one layer in MoCo v1, two in v2.
    """

    def __init__(self, backbone: Backbone, head: Sequence[int], dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = backbone.feature_dim
        self.dim = dim
        widths = (self.feature_dim, *head, dim)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers[:-1])

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, feature_dim), after global average pooling: what is kept after pretraining."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, dim), not normalised."""
        return self.head(self.backbone(x))


def feature_dim(arch: str, width: float) -> int:
    """D of an architecture: the width of its features, and of the hidden layer of MoCo v2's head."""
    return _feature_dim(ARCHITECTURES[arch], width)


def _feature_dim(shape: _Shape, width: float) -> int:
    return round(512 * shape.block.expansion * width)


def build_encoder(
    arch: str,
    *,
    width: float = 1.0,
    stem: str = "imagenet",
    head: Sequence[int] = (),
    dim: int = 128,
    bn_splits: int = 1,
) -> Encoder:
    """An encoder with torchvision's default initialisation (torch's global generator), in channels-last layout.

    arch       a key of ARCHITECTURES
    width      factor on every channel count, a multiple of 1/8 so that all are multiples of 8 (tensor cores)
    stem       "imagenet" (7×7 of stride 2, then pooling) or "cifar" (3×3 of stride 1)
    head       hidden widths of the projection: () is linear (MoCo v1), (2048,) the MLP of MoCo v2 with ResNet-50
    dim        C, size of the embedding
    bn_splits  groups of a batch that batch norm normalises separately; 1 is plain batch norm

    Raises ConfigError for a name that does not exist and a value that cannot be built.
    """
    if arch not in ARCHITECTURES:
        raise ConfigError(_unknown("architecture", arch, ARCHITECTURES))
    if stem not in STEMS:
        raise ConfigError(_unknown("stem", stem, STEMS))
    shape = ARCHITECTURES[arch]
    if not (0 < width <= 64) or (width * 8) % 1:
        raise ConfigError(f"width is {width}; give a multiple of 0.125, such as 0.25, 0.5, 1, 2 or 4")
    smallest = _STEM_CHANNELS / shape.width_per_group / _STEM_CHANNELS  # one channel in each group
    if width < smallest:
        raise ConfigError(f"width {width} leaves no channel in the groups of {arch}; give {smallest} or more")
    if dim < 1:
        raise ConfigError(f"the embedding has {dim} dimensions; give 1 or more, such as 128")
    if any(hidden < 1 for hidden in head):
        raise ConfigError(f"the head has hidden widths {tuple(head)}; every one must be 1 or more")
    backbone = Backbone(shape, width=width, stem=stem, bn_splits=bn_splits)
    encoder = Encoder(backbone, head, dim)
    return encoder.to(memory_format=torch.channels_last)


def _unknown(what: str, name: str, known: Sequence[str] | dict[str, _Shape]) -> str:
    nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"unknown {what} {name!r}; did you mean {nearest!r}? (known: {', '.join(known)})"
