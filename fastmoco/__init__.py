"""Momentum Contrast (MoCo) pretraining as fast as the hardware allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to load: only what needs it does so
    from pathlib import Path

    from torch import nn

    from fastmoco.export.preprocessing import Preprocessing

__all__ = ["load_backbone"]


def load_backbone(
    path: str | Path, *, arch: str | None = None, stem: str | None = None, side: int | None = None
) -> tuple[nn.Module, Preprocessing]:
    """A pretrained backbone, and what turns an image into its input.

        backbone, preprocess = load_backbone("runs/NAME")
        features = backbone(preprocess(image)[None])            (1, D) float32

    path         a run directory, a checkpoint, a file of `fastmoco export`, a checkpoint of facebookresearch/moco, or a
                 torchvision state dict of a ResNet
    arch, stem   what it has to be, where you know: anything else is an error
    side         S of the views in pixels, in place of the one it was trained with

    The backbone is torchvision's `ResNet` with an identity for `fc`, in evaluation mode, float32, on the CPU; before it
    goes a `preprocessing.Preprocessing`. Raises CheckpointError or ConfigError, ValueErrors of one line that say why.
    """
    from fastmoco.export.preprocessing import Preprocessing
    from fastmoco.export.read import read_backbone

    backbone = read_backbone(path, arch=arch, stem=stem, side=side)
    return backbone.module, Preprocessing(backbone.side, backbone.mean, backbone.std)
