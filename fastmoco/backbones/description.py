"""What a file says of its backbone beside the tensors: how it was built, and how images were prepared for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastmoco.config import RunConfig
from fastmoco.config.augment import augmentation_of
from fastmoco.errors import CheckpointError, ConfigError
from fastmoco.model.architectures import check_architecture

RECORD = "fastmoco"  # under this name an exported file says how images were prepared

Colour = tuple[float, ...]  # one number for each channel
_RUN_FIELDS = (
    "arch",
    "width",
    "stem",
    "crop_size",
    "aug",
    "mean",
    "std",
    "normalization",
    "data",
    "channels",
    "symmetric",
)


@dataclass(frozen=True)
class Description:
    """As in `read.LoadedBackbone`; None where the file says nothing.

    forwards  batches that the query encoder of a run was trained on, which its num_batches_tracked do not count
    """

    arch: str | None = None
    stem: str | None = None
    width: float | None = None
    side: int | None = None
    mean: Colour | None = None
    std: Colour | None = None
    data: str | None = None
    forwards: int = 0


def to_record(*, side: int, mean: Colour, std: Colour, data: str | None, arch: str | None = None) -> str:
    """What a file has to say for `read_backbone` to prepare images in the same way, as one string of JSON.

    arch  of a model that shapes do not tell, such as timm/NAME
    """
    said = {"side": side, "mean": mean, "std": std, "data": data}
    return json.dumps(said | ({} if arch is None else {"arch": arch}))


def from_record(text: str, origin: str) -> Description:
    """The inverse of `to_record`. Raises CheckpointError."""
    try:
        said = json.loads(text)
        side, mean, std, data = said["side"], _numbers(said["mean"]), _numbers(said["std"]), said["data"]
        arch = said.get("arch")
        if len(mean) != len(std) or not (
            type(side) is int and 8 <= side <= 16384 and min(std) > 0 and isinstance(data, str | None)
        ):
            raise ValueError(text)
        check_architecture(arch)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{origin} says how images were prepared, but not readably: {text[:80]!a}") from None
    return Description(arch=arch, side=side, mean=mean, std=std, data=data)


def _numbers(values: Any) -> Colour:
    numbers = tuple(map(float, values))
    if not numbers or not math.isfinite(sum(numbers)):
        raise ValueError(values)
    return numbers


def from_config(flat: Mapping[str, Any], origin: str, step: int = 0) -> Description:
    """From the settings of a run, resolved or from a checkpoint, after so many steps. Raises CheckpointError."""
    try:
        config = RunConfig().replace(**{name: flat[name] for name in _RUN_FIELDS if name in flat})
        augmentation = augmentation_of(config.augment, config.data.channels) if config.augment.aug else None
    except ConfigError as error:
        raise CheckpointError(f"{origin} was trained with settings that do not exist here: {error}") from None
    return Description(
        arch=config.model.arch,
        stem=None if config.model.stem == "auto" else config.model.stem,
        width=config.model.width,
        side=config.augment.crop_size,
        mean=augmentation and augmentation.mean,
        std=augmentation and augmentation.std,
        data=config.data.data[0] if len(config.data.data) == 1 else None,
        forwards=step * (1 + config.model.symmetric),
    )
