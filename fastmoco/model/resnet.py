"""torchvision's ResNets, ResNeXts and wide ResNets, at any width and optionally with a stem for small images.

B batch · S side of a view · D features
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

from fastmoco.errors import ConfigError
from fastmoco.model.batchnorm.split import SplitBatchNorm2d, freeze_running_stats
from fastmoco.model.family import NormLayer, Shapes, difference
from fastmoco.model.input_channels import set_channels
from fastmoco.model.winograd import use_winograd

if TYPE_CHECKING:
    from fastmoco.model.pointwise.op import Pending

Pair = tuple[Tensor, Tensor]

_STEM_CHANNELS = 64  # of every torchvision ResNet at width 1
_STEMS = {7: "imagenet", 3: "cifar"}  # by kernel size of the first convolution
# Names that give away what none of the architectures has.
_VARIANTS = {
    r"(conv1\.\d|stem\.\d|conv2\.weight$)": "a deep stem",
    r"layer\d+\.\d+\.downsample\.2\.": "average pooling in its shortcuts (ResNet-D)",
    r"layer\d+\.\d+\.se\.": "squeeze-and-excitation",
    r"layer\d+\.\d+\.(attn|attention)\.": "attention in its blocks",
    r"layer\d+\.\d+\.(convs|bns|conv2\.conv)\.": "split convolutions (Res2Net, ResNeSt)",
    r"attnpool\.": "attention pooling",
}


class Shape(NamedTuple):
    """Type of block, blocks per stage, and groups and their width in the 3×3 convolution of a bottleneck."""

    block: str
    layers: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64

    @property
    def expansion(self) -> int:
        """Output channels of a block, as a multiple of its planes."""
        return 4 if self.block == "bottleneck" else 1


SHAPES = {
    "resnet18": Shape("basic", (2, 2, 2, 2)),
    "resnet34": Shape("basic", (3, 4, 6, 3)),
    "resnet50": Shape("bottleneck", (3, 4, 6, 3)),
    "resnet101": Shape("bottleneck", (3, 4, 23, 3)),
    "resnet152": Shape("bottleneck", (3, 8, 36, 3)),
    "resnext50_32x4d": Shape("bottleneck", (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext50_32x8d": Shape("bottleneck", (3, 4, 6, 3), groups=32, width_per_group=8),  # in the MoCo paper
    "resnext101_32x8d": Shape("bottleneck", (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": Shape("bottleneck", (3, 4, 23, 3), groups=64, width_per_group=4),
    "wide_resnet50_2": Shape("bottleneck", (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": Shape("bottleneck", (3, 4, 23, 3), width_per_group=128),
}


class BasicBlock(resnet.BasicBlock):
    """torchvision's block, with ReLU and residual sum fused into the preceding batch norm.

    Input and output are the same tensor twice, for the branch and the shortcut, so that batch norm adds up their
    gradients (see `batchnorm.triton.split_batch_norm`).
    """

    def forward(self, x: Pair) -> Pair:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = self.bn1(self.conv1(x[0]), relu=True)
        identity = x[1] if self.downsample is None else self.downsample(x[1])
        return self.bn2(self.conv2(y), relu=True, residual=identity, twice=True)


class Bottleneck(resnet.Bottleneck):
    """torchvision's block, as `BasicBlock` is.

    fused      whether its 1×1 convolutions are computed in training together with the batch norms around them
               (`fastmoco.model.pointwise.op`): see `fuse_convolutions`
    passes_on  whether, if fused, its last batch norm is left to the next block, which must be fused
    """

    fused = False
    passes_on = False

    def forward(self, x: Pair | Pending) -> Pair | Pending:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.fused and self.training and self.bn1.ranks is None:
            return self._fused_forward(x)
        assert not hasattr(x, "residual"), "the block before this one is fused"
        y = self.bn1(self.conv1(x[0]), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        identity = x[1] if self.downsample is None else self.downsample(x[1])
        return self.bn3(self.conv3(y), relu=True, residual=identity, twice=True)

    def _fused_forward(self, x: Pair | Pending) -> Pair | Pending:
        # Triton comes with torch's CUDA builds only
        from fastmoco.model.pointwise.layers import convolve, normalise_later
        from fastmoco.model.pointwise.op import finish

        bn1, bn2, bn3 = (cast(SplitBatchNorm2d, norm) for norm in (self.bn1, self.bn2, self.bn3))
        first = x[0] if len(x) == 2 else x
        y, applied = convolve(first, self.conv1, bn1)
        identity = x[1] if applied is None else applied
        y = normalise_later(self.conv2(finish(y)), bn2)
        identity = identity if self.downsample is None else self.downsample(identity)
        z, _ = convolve(y, self.conv3, bn3, residual=identity)
        return z if self.passes_on else finish(z, twice=True)


class _ResNet(resnet.ResNet):
    """torchvision's ResNet without its classifier, every channel count multiplied by `width`.

    Parameter names, order and initialisation are torchvision's: at width 1 with the ImageNet stem, its state dict loads
    into torchvision's model, and only `fc.weight` and `fc.bias` are missing.
    """

    def __init__(
        self, shape: Shape, blocks: Mapping[str, type[Any]], *, width: float, stem: str, norm_layer: NormLayer
    ) -> None:
        self.width = width  # read by `_make_layer`, which torchvision's constructor calls
        super().__init__(
            blocks[shape.block],
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
        self.fc = nn.Identity()

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == _STEM_CHANNELS:
            self.inplanes = round(_STEM_CHANNELS * self.width)
        return super()._make_layer(block, round(planes * self.width), blocks, stride, dilate)


class Backbone(_ResNet):
    """The ResNet to train: (B, 3, S, S) → (B, D), with batch norm, residual sum and ReLU as one operation.

    `stem="cifar"` has a 3×3 convolution of stride 1 and no pooling (He et al. 2016, section 4.2).

    With `checkpoint_activations` a forward that will be differentiated keeps only the input of each of the four stages,
    and the backward recomputes the rest: gradients and statistics are the same bit for bit, for about a third more
    arithmetic (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """

    def __init__(self, shape: Shape, *, width: float, stem: str, norm_layer: NormLayer) -> None:
        super().__init__(
            shape, {"basic": BasicBlock, "bottleneck": Bottleneck}, width=width, stem=stem, norm_layer=norm_layer
        )
        use_winograd(self)
        self.checkpoint_activations = False
        self.stem_format = "channels-last"

    def forward(self, x: Tensor) -> Tensor:
        x, pooled = self._first_convolution(x), not isinstance(self.maxpool, nn.Identity)
        pair = self.bn1(x, relu=True, twice=True, pool=pooled)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            pair = recomputed(stage, pair) if self.checkpoint_activations and torch.is_grad_enabled() else stage(pair)
        return self.avgpool(pair[0]).flatten(1)

    def _first_convolution(self, x: Tensor) -> Tensor:
        """conv1(x), channels-last; computed in `stem_format`, since libraries differ in speed at three channels."""
        if self.stem_format == "channels-last":
            return self.conv1(x)
        y = F.conv2d(
            x.contiguous(), self.conv1.weight.contiguous(), stride=self.conv1.stride, padding=self.conv1.padding
        )
        return y.contiguous(memory_format=torch.channels_last)


def has_bottlenecks(arch: str) -> bool:
    """Whether an architecture is one of SHAPES with bottleneck blocks."""
    return arch in SHAPES and SHAPES[arch].block == "bottleneck"


def fuse_convolutions(module: nn.Module, fused: bool) -> int:
    """Set whether the bottleneck blocks of a module fuse their 1×1 convolutions; returns how many blocks there are.

    In a stage, the last batch norm of a block is then computed by the next block's first convolution.
    """
    blocks = [block for block in module.modules() if isinstance(block, Bottleneck)]
    for block in blocks:
        block.fused, block.passes_on = fused, False
    for stage in (layer for layer in module.modules() if isinstance(layer, nn.Sequential)):
        for block, following in pairwise(stage):
            if isinstance(block, Bottleneck) and isinstance(following, Bottleneck):
                block.passes_on = fused
    return len(blocks)


def recomputed(stage: nn.Module, x: Pair) -> Pair:
    """stage(x), with its activations recomputed in the backward pass."""
    return checkpoint(
        stage,
        x,
        use_reentrant=False,
        preserve_rng_state=False,  # no random numbers here; a CUDA graph cannot read the RNG state
        context_fn=lambda: (nullcontext(), freeze_running_stats(stage)),
    )


class ResNetFamily:
    """`fastmoco.model.family.BackboneFamily` of the names in SHAPES."""

    @staticmethod
    def build(
        arch: str, *, width: float = 1.0, stem: str = "imagenet", norm_layer: NormLayer | None = None
    ) -> nn.Module:
        """A `Backbone` if given a norm layer, else torchvision's own `ResNet`, which computes the same in evaluation.

        Raises ConfigError if the width leaves no channel in a group.
        """
        shape = SHAPES[arch]
        if width * shape.width_per_group < 1:
            smallest = 1 / shape.width_per_group
            raise ConfigError(f"width {width} leaves no channel in the groups of {arch}; give {smallest} or more")
        if norm_layer is not None:
            return Backbone(shape, width=width, stem=stem, norm_layer=norm_layer)
        blocks = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}
        model = _ResNet(shape, blocks, width=width, stem=stem, norm_layer=nn.BatchNorm2d)
        # Only construction differs. As torchvision's class it can be pickled and exported without fastmoco.
        object.__setattr__(model, "__class__", resnet.ResNet)
        return model

    @staticmethod
    def feature_dim(arch: str, width: float) -> int:
        return round(512 * SHAPES[arch].expansion * width)

    @staticmethod
    def identify(shapes: Shapes) -> tuple[str, str, float]:
        for pattern, kind in _VARIANTS.items():
            if name := next((name for name in shapes if re.match(pattern, name)), None):
                raise ValueError(f"it is a ResNet with {kind} ({name[:80]!a} is unexpected)")
        if "bn1.weight" in shapes and "bn1.running_mean" not in shapes:
            raise ValueError("it has no running statistics (bn1.running_mean): its normalisation is not batch norm")
        first = shapes.get("conv1.weight", ())
        if len(first) != 4 or first[1] < 1 or first[2] != first[3] or first[2] not in _STEMS:
            actual = f"conv1.weight is {list(first)}" if first else "there is no conv1.weight"
            raise ValueError(f"{actual}, and a ResNet's is [64, 3, 7, 7], or [64, 3, 3, 3] with the CIFAR stem")
        stem, width = _STEMS[first[2]], first[0] / _STEM_CHANNELS
        if width * 8 % 1 or width > 64:
            raise ValueError(f"its first layer has {first[0]} channels, expected a multiple of 8")
        layers = tuple(_blocks(shapes, stage) for stage in (1, 2, 3, 4))
        block = "bottleneck" if "layer1.0.conv3.weight" in shapes else "basic"
        candidates = [
            name
            for name, shape in SHAPES.items()
            if shape.layers == layers and shape.block == block and width * shape.width_per_group >= 1
        ]
        if not candidates:
            raise ValueError(f"its stages have {layers} {block} blocks, unlike {', '.join(SHAPES)}")
        reasons = []
        for name in candidates:
            reason = difference(shapes, _shapes(name, stem, width, first[1]))
            if reason is None:
                return name, stem, width
            reasons.append(f"{name}: {reason}")
        raise ValueError(f"its tensors match none of the known architectures ({'; '.join(reasons)})")


def set_cifar_stem(model: nn.Module) -> None:
    """Give a ResNet of torchvision or timm a 3×3 convolution of stride 1 and no pooling, for small images."""
    outputs, inputs = model.get_parameter("conv1.weight").shape[:2]
    model.conv1, model.maxpool = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.Identity()


def _shapes(arch: str, stem: str, width: float, channels: int) -> Shapes:
    with torch.device("meta"):  # allocates nothing
        model = ResNetFamily.build(arch, width=width, stem=stem)
        set_channels(model, channels)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _blocks(shapes: Shapes, stage: int) -> int:
    count = 0
    while f"layer{stage}.{count}.conv1.weight" in shapes:
        count += 1
    return count
