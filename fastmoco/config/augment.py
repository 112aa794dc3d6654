"""Settings of the augmentation, and the augmentation that they describe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fastmoco.config.checks import check_types, flag, require
from fastmoco.config.choices import Aug
from fastmoco.errors import ConfigError
from pipelines.augment.presets import AUGMENTATIONS, IMAGENET_MEAN, IMAGENET_STD, Augmentation

_PROBABILITIES = {
    "hflip": ("flip_p", "horizontal flips"),
    "vflip": ("vertical_flip_p", "vertical flips"),
    "grayscale": ("grey_p", "greyscale"),
    "blur": ("blur_p", "blur"),
    "solarize": ("solarise_p", "solarisation"),
}
"""Fields that are probabilities: what they replace in a preset, and its name."""
_MAX_HUE = 0.5  # all hues


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How two views are made from an image."""

    crop_size: int | None = None
    """Side of a view in pixels (None: from the size of the images; their median shorter side, at most 224)."""
    aug: Aug | None = None
    """Augmentation of MoCo v1, v2, its CIFAR demo, or BYOL (None: from the closest recipe)."""
    aug_plus: bool = False
    """Same as --aug v2."""
    crop_scale_min: float | None = None
    """Minimum area of a random crop, as a fraction of the image (None: from the closest recipe or --aug)."""
    hflip: float | None = None
    """Probability of a horizontal flip, 0 for none (None: from --aug)."""
    vflip: float | None = None
    """Probability of a vertical flip (None: from --aug, where it is 0)."""
    color_jitter: float | None = None
    """Strength of the colour jitter, relative to --aug: 0 for none, 0.5 for half, 1 for all of it (None: 1)."""
    grayscale: float | None = None
    """Probability of conversion to grey, 0 for never (None: from --aug)."""
    blur: float | None = None
    """Probability of a Gaussian blur, 0 for never (None: from --aug)."""
    solarize: float | None = None
    """Probability of solarisation, 0 for never (None: from --aug)."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, or one for all, of values from 0 to 1 (None: from --normalization)."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, or one for all (None: from --normalization)."""
    normalization: Literal["aug", "imagenet", "scan"] = "aug"
    """Mean and std: those of --aug, of ImageNet, or of the images, as measured by fastmoco scan."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "crop_size", lambda v: v >= 8, "8 pixels or more")
        require(self, "crop_scale_min", lambda v: 0 < v <= 1, "a fraction above 0 and up to 1")
        for name in _PROBABILITIES:
            require(self, name, lambda v: 0 <= v <= 1, "a probability from 0 to 1")
        require(self, "color_jitter", lambda v: 0 <= v <= 10, "a factor from 0 to 10", "1 is the strength of --aug")
        for name in ("mean", "std"):
            require(self, name, lambda v: len(v) > 0, "one number, or one for each channel")
        scale = "of values from 0 to 1: divide those of 0 to 255 by 255"
        require(self, "mean", lambda v: all(0 <= x <= 1 for x in v), "numbers from 0 to 1", scale)
        require(self, "std", lambda v: all(0 < x <= 1 for x in v), "numbers above 0 and up to 1", scale)
        if self.aug_plus and self.aug not in (None, "v2"):
            raise ConfigError(f"--aug-plus means --aug v2, but --aug is {self.aug}: drop one of the two")
        if (self.mean is None) != (self.std is None):
            given, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise ConfigError(f"{flag(given)} is given and {flag(missing)} is not: give both, or neither")
        if self.mean is not None and self.normalization == "imagenet":
            raise ConfigError("--mean with --std and --normalization imagenet exclude each other: drop one of the two")


def check_channels(config: AugmentConfig, channels: int) -> None:
    """Raises ConfigError for numbers of other channels than the images have, and for what only colours have."""
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and len(values) not in (1, channels):
            each = "three for red, green and blue" if channels == 3 else f"{channels} for the channels"
            raise ConfigError(f"{flag(name)} has {len(values)} numbers: expected one, or {each}")
    if channels == 3:
        return
    if config.grayscale:
        raise ConfigError(f"--grayscale is for red, green and blue, and --channels is {channels}: leave it out")
    if config.normalization == "imagenet":
        raise ConfigError(
            f"--normalization imagenet is of red, green and blue, and --channels is {channels}: use --normalization "
            "scan, or --mean and --std"
        )


def augmentation_of(config: AugmentConfig, channels: int = 3) -> Augmentation:
    """The augmentation of a configuration with --aug: its preset, changed by what is given beside it.

    With other channels than three, saturation, hue and greyscale are left out, and mean and std must be given.

    Raises ConfigError for --normalization scan without the numbers, which `run.resolve` fills in.
    """
    assert config.aug is not None
    preset = AUGMENTATIONS[config.aug]
    if channels != 3:
        preset = replace(preset, saturation=0.0, hue=0.0, grey_p=0.0)
    given = {field: getattr(config, name) for name, (field, _) in _PROBABILITIES.items()}
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    if config.crop_scale_min is not None:
        changes["scale"] = (config.crop_scale_min, preset.scale[1])
    if config.color_jitter == 0:
        changes["jitter_p"] = 0.0
    elif config.color_jitter is not None:
        strengths = ("brightness", "contrast", "saturation", "hue")
        changes |= {name: config.color_jitter * getattr(preset, name) for name in strengths}
        changes["hue"] = min(_MAX_HUE, config.color_jitter * preset.hue)
    if config.mean is not None and config.std is not None:
        changes |= {"mean": _per_channel(config.mean, channels), "std": _per_channel(config.std, channels)}
    elif config.normalization == "imagenet":
        changes |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    elif config.normalization == "scan":
        raise ConfigError("--normalization scan needs the mean and std of a scan: run fastmoco scan DATA")
    elif channels != 3:
        raise ConfigError(f"there is no usual mean and std of {channels} channels: give --mean and --std")
    return replace(preset, **changes)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if len(values) == channels else channels * values


def describe(config: AugmentConfig, channels: int = 3) -> str:
    """The augmentation of a configuration with --aug in words: its preset, and in which points it differs from that."""
    assert config.aug is not None
    preset, own = AUGMENTATIONS[config.aug], augmentation_of(config, channels)
    points = []
    if own.scale != preset.scale:
        points.append(f"crops of {own.scale[0]:g} of the area or more")
    if channels != 3:
        points.append("without saturation, hue and greyscale, which only red, green and blue have")
    for field, words in _PROBABILITIES.values():
        if channels != 3 and field == "grey_p":
            continue
        p = getattr(own, field)
        if p != getattr(preset, field):
            points.append(f"{words} with probability {p:g}" if p else f"no {words}")
    if own.jitter_p != preset.jitter_p:
        points.append("no colour jitter")
    elif own.brightness != preset.brightness:
        points.append(f"colour jitter × {config.color_jitter:g}")
    if (own.mean, own.std) != (preset.mean, preset.std):
        points.append(f"mean {_numbers(own.mean)}, std {_numbers(own.std)}")
    return "; ".join([f"augmentation {config.aug}", *points])


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in (values[:1] if len({*values}) == 1 else values))
