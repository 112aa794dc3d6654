"""What a family of backbones offers.

B batch · S side of a view · D features
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import nn

COUNTERS = ".num_batches_tracked"  # of batch norm: files from before torch 0.4.1 have none, and nothing here reads them

NormLayer = Callable[[int], nn.Module]
"""Number of channels → normalisation layer."""


class BackboneFamily(Protocol):
    """The architectures of one module, entered in `fastmoco.registry.ARCHITECTURES`.

    A backbone maps (B, 3, S, S) images to (B, D) features. Batch norm in it comes from `norm_layer`, which is
    `batchnorm.split.SplitBatchNorm2d` in training; groups, ranks and kernels are set on those layers from outside. One
    that has an attribute `checkpoint_activations` can be trained with --checkpoint-activations.
    """

    @staticmethod
    def build(
        arch: str, *, width: float = 1.0, stem: str = "imagenet", norm_layer: NormLayer | None = None
    ) -> nn.Module:
        """A backbone with fresh weights from torch's global generator.

        norm_layer  None for a backbone to use or export: plain `nn.BatchNorm2d`, the same names and shapes

        Raises ConfigError for a width or stem that cannot be built.
        """
        ...

    @staticmethod
    def feature_dim(arch: str, width: float) -> int:
        """D."""
        ...

    @staticmethod
    def identify(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str, float]:
        """(arch, stem, width) of the backbone of this family with tensors of exactly these names and shapes, the
        counters of batch norm aside. Raises ValueError with the reason where there is none."""
        ...
