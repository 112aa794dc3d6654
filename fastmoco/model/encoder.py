"""The encoder: a backbone and a projection head.

B batch · S side of a view · D features of the backbone · C embedding · I channels of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.errors import ConfigError
from fastmoco.model.architectures import check_architecture, family
from fastmoco.model.batchnorm.split import SplitBatchNorm2d
from fastmoco.model.input_channels import first_convolution, set_channels


class Encoder(nn.Module):
    """A network from views to embeddings.

    backbone     (B, I, S, S) → (B, feature_dim)
    feature_dim  D
    head         widths of the hidden layers, with ReLU between linear layers: none in MoCo v1, one in v2
    dim          C
    """

    backbone: Any  # nn.Module of any family

    def __init__(self, backbone: nn.Module, feature_dim: int, head: Sequence[int], dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = feature_dim
        self.dim = dim
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((feature_dim, *head, dim)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers[:-1])

    def features(self, x: Tensor) -> Tensor:
        """(B, I, S, S) → (B, feature_dim), after global average pooling: the output used after pretraining."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, S, S) → (B, dim), not normalised."""
        return self.head(self.backbone(x))


def feature_dim(arch: str, width: float) -> int:
    """D of an architecture: the width of its features, and of the hidden layer of MoCo v2's head."""
    return family(arch).feature_dim(arch, width)


def reset_first_convolution(backbone: nn.Module) -> None:
    """Give the first convolution torch's default initial weights, as the CIFAR demo's stem has: He's with a = √5."""
    first_convolution(backbone)[1].reset_parameters()


def build_encoder(
    arch: str,
    *,
    width: float = 1.0,
    stem: str = "imagenet",
    head: Sequence[int] = (),
    dim: int = 128,
    bn_splits: int = 1,
    channels: int = 3,
) -> Encoder:
    """Build an encoder with torchvision's default initialisation (torch's global generator), in channels-last layout.

    arch       a key of `fastmoco.registry.ARCHITECTURES`
    width      factor on every channel count, a multiple of 1/8 so that all are multiples of 8 (tensor cores)
    stem       "imagenet" (7×7 of stride 2, then pooling) or "cifar" (3×3 of stride 1)
    head       hidden widths of the projection head: () is linear (MoCo v1), (2048,) the MLP of MoCo v2 with ResNet-50
    dim        C, dimension of the embedding
    bn_splits  groups of a batch that batch norm normalises separately; 1 is plain batch norm
    channels   I of the images

    Raises ConfigError for an unknown name or an invalid value.
    """
    check_architecture(arch, stem)
    if not (0 < width <= 64) or (width * 8) % 1:
        raise ConfigError(f"width is {width}; give a multiple of 0.125, such as 0.25, 0.5, 1, 2 or 4")
    if dim < 1:
        raise ConfigError(f"the embedding has {dim} dimensions; give 1 or more, such as 128")
    if any(hidden < 1 for hidden in head):
        raise ConfigError(f"the head has hidden widths {tuple(head)}; every one must be 1 or more")
    norm_layer = partial(SplitBatchNorm2d, num_splits=bn_splits)
    backbone = family(arch).build(arch, width=width, stem=stem, norm_layer=norm_layer)
    set_channels(backbone, channels)
    encoder = Encoder(backbone, feature_dim(arch, width), head, dim)
    return encoder.to(memory_format=torch.channels_last)
