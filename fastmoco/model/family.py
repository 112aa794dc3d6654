"""The interface of a family of backbones.

B batch · S side of a view · D features
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import nn

COUNTERS = ".num_batches_tracked"  # of batch norm: missing in files from before torch 0.4.1, and not used here

NormLayer = Callable[[int], nn.Module]
"""Number of channels → normalisation layer."""


class BackboneFamily(Protocol):
    """The architectures of one module, registered in `fastmoco.registry.ARCHITECTURES`.

    A backbone maps (B, 3, S, S) images to (B, D) features. Its batch norm layers come from `norm_layer`, in training
    `batchnorm.split.SplitBatchNorm2d`, whose groups, ranks and kernels are set afterwards. A backbone with an attribute
    `checkpoint_activations` supports --checkpoint-activations.
    """

    @staticmethod
    def build(
        arch: str, *, width: float = 1.0, stem: str = "imagenet", norm_layer: NormLayer | None = None
    ) -> nn.Module:
        """Build a backbone with random weights from torch's global generator.

        norm_layer  None for inference and export: plain `nn.BatchNorm2d`, with the same names and shapes

        Raises ConfigError for a width or stem that cannot be built.
        """
        ...

    @staticmethod
    def feature_dim(arch: str, width: float) -> int:
        """D, the number of features."""
        ...

    @staticmethod
    def identify(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str, float]:
        """(arch, stem, width) of the backbone of this family with exactly these tensors, apart from COUNTERS.

        Raises ValueError with the reason if there is none.
        """
        ...
