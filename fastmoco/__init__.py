"""Momentum Contrast (MoCo) pretraining as fast as the hardware allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import, so the package imports it only when needed
    from pathlib import Path

    from torch import nn

    from fastmoco.export.preprocessing import Preprocessing

__all__ = ["load_backbone"]


def load_backbone(
    path: str | Path, *, arch: str | None = None, stem: str | None = None, side: int | None = None
) -> tuple[nn.Module, Preprocessing]:
    """Load a pretrained backbone and the preprocessing of its input images.

        backbone, preprocess = load_backbone("runs/NAME")
        features = backbone(preprocess(image)[None])            (1, D) float32

    path         a run directory, a checkpoint, a file of `fastmoco export`, a checkpoint of facebookresearch/moco, or a
                 torchvision state dict of a ResNet
    arch, stem   the expected architecture and stem: anything else is an error
    side         side of the views in pixels, instead of the one used in training

    The backbone is torchvision's `ResNet` with an identity as `fc`, in evaluation mode, float32, on the CPU; the
    preprocessing is an `export.preprocessing.Preprocessing`. Raises CheckpointError or ConfigError, both ValueErrors
    with a message of one line.
    """
    from fastmoco.export.preprocessing import Preprocessing
    from fastmoco.export.read import read_backbone

    backbone = read_backbone(path, arch=arch, stem=stem, side=side)
    return backbone.module, Preprocessing(backbone.side, backbone.mean, backbone.std)
