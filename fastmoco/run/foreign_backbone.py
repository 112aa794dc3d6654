"""What a run decides for a backbone of others (timm/NAME, own/NAME): normalisation, view size, kernels."""

from __future__ import annotations

from typing import Any

from fastmoco.config import RunConfig
from fastmoco.model.architectures import named_family
from fastmoco.step.kernels import FUSED


def taken_as_it_is(arch: str, config: RunConfig, side: int, small: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that follow from the model, and the reasons by field.

    side   of the views in pixels
    small  whether they are small images, which keep the normalisation of their augmentation

    For photographs, mean and std are timm's own of this model, unless mean and std or --normalization say otherwise.
    Raises ConfigError or BackendMissingError if the model cannot be built.
    """
    filled: dict[str, Any] = {}
    notes: list[str] = []
    named, augment = named_family(arch), config.augment
    own = None if named is None else named.settings(arch)
    if own is not None:
        if not small and augment.mean is None and augment.normalization == "aug":
            filled |= {"mean": own.mean, "std": own.std}
            notes.append("mean and std as timm normalises for it")
        if own.reduction is not None and side < 2 * own.reduction:
            notes.append(f"{side} pixels leave a last feature map of 1×1: --crop-size {2 * own.reduction} or more")
        elif side != own.side:
            notes.append(f"timm uses it at {own.side} pixels")
    run = config.run
    if run.kernels == FUSED:
        notes.append(f"--kernels {FUSED} is for our ResNets' bottlenecks: triton instead")
    if run.stem_format == "contiguous":
        notes.append("--stem-format contiguous is for our ResNets: left out")
    return filled, {"arch": "; ".join(notes)} if notes else {}


def for_any_model(config: RunConfig) -> RunConfig:
    """The configuration without what only our own ResNets have: fused convolutions and the format of their stem.

    Whether torch.compile takes the model is seen when the first step is checked; without --check it is not tried.
    """
    run = config.run
    return config.replace(
        kernels="triton" if run.kernels == FUSED else run.kernels,
        stem_format="channels-last",
        compile="off" if run.compile == "auto" and run.check == "off" else run.compile,
    )
