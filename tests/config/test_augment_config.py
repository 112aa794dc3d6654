"""The switches of the augmentation: what they change in a preset, what is refused, and how it is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastmoco.config import AugmentConfig, DataConfig, RunConfig
from fastmoco.config.augment import augmentation_of, describe
from fastmoco.errors import ConfigError
from pipelines.augment.presets import AUGMENTATIONS, BYOL, CIFAR, IMAGENET_MEAN, IMAGENET_STD, V1, V2


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_without_switches_it_is_the_preset(name: str) -> None:
    assert augmentation_of(AugmentConfig(aug=name)) is not None
    assert augmentation_of(AugmentConfig(aug=name)) == AUGMENTATIONS[name]
    assert describe(AugmentConfig(aug=name)) == f"augmentation {name}"


@pytest.mark.parametrize(
    ("preset", "switches", "changes", "said"),
    [
        (V2, {"hflip": 0}, {"flip_p": 0.0}, "no horizontal flips"),
        (V2, {"vflip": 0.5}, {"vertical_flip_p": 0.5}, "vertical flips with probability 0.5"),
        (BYOL, {"grayscale": 0, "blur": 0}, {"grey_p": 0.0, "blur_p": 0.0}, "no greyscale; no blur"),
        (V1, {"blur": 0.5}, {"blur_p": 0.5}, "blur with probability 0.5"),
        (BYOL, {"solarize": 0.0}, {"solarise_p": 0.0}, "no solarisation"),
        (V2, {"color_jitter": 0}, {"jitter_p": 0.0}, "no colour jitter"),
        (
            V2,
            {"color_jitter": 0.5},
            {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05},
            "colour jitter × 0.5",
        ),
        (V1, {"color_jitter": 2}, {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.5}, "jitter × 2"),
        (V2, {"crop_scale_min": 0.5}, {"scale": (0.5, 1.0)}, "crops of 0.5 of the area or more"),
        (CIFAR, {"mean": (0.5,), "std": (0.25,)}, {"mean": 3 * (0.5,), "std": 3 * (0.25,)}, "mean 0.5, std 0.25"),
        (
            V2,
            {"mean": (0.1, 0.2, 0.3), "std": (1, 0.5, 0.25)},
            {"mean": (0.1, 0.2, 0.3), "std": (1.0, 0.5, 0.25)},
            "mean 0.1 0.2 0.3, std 1 0.5 0.25",
        ),
        (CIFAR, {"normalization": "imagenet"}, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}, "mean 0.485 0.456 0.406"),
    ],
)
def test_a_switch_changes_the_preset_in_one_point(preset: Any, switches: dict, changes: dict, said: str) -> None:
    config = AugmentConfig(aug=preset.name, **switches)
    assert augmentation_of(config) == replace(preset, **changes)
    assert said in describe(config)
    assert RunConfig.from_json(replace(RunConfig(), augment=config).to_json()).augment == config


def test_the_value_of_the_preset_is_no_difference() -> None:
    given = AugmentConfig(
        aug="byol",
        hflip=0.5,
        color_jitter=1,
        grayscale=0.2,
        blur=0.55,
        solarize=0.1,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    assert augmentation_of(given) == BYOL
    assert describe(given) == "augmentation byol"


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"hflip": 1.5}, ["--hflip is 1.5", "probability from 0 to 1"]),
        ({"vflip": -0.1}, ["--vflip is -0.1", "probability"]),
        ({"grayscale": float("nan")}, ["--grayscale is nan"]),
        ({"color_jitter": -1}, ["--color-jitter is -1", "factor from 0 to 10"]),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, ["--mean is (123.7", "from 0 to 1", "by 255"]),
        ({"mean": (0.5,), "std": (0.0,)}, ["--std is (0.0,)", "above 0"]),
        ({"mean": (0.5,), "std": ("a",)}, ["--std is ('a',)", "a list of finite numbers"]),
        ({"mean": (0.5,)}, ["--mean is given and --std is not", "both"]),
        ({"std": (0.5,)}, ["--std is given and --mean is not", "both"]),
        ({"mean": (0.5,), "std": (0.5,), "normalization": "imagenet"}, ["--normalization imagenet", "drop one"]),
        ({"normalization": "imagnet"}, ["--normalization is 'imagnet'", "did you mean imagenet?"]),
    ],
)
def test_a_switch_that_makes_no_sense_is_refused_in_one_line(switches: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        AugmentConfig(**switches)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("channels", "switches", "words"),
    [
        (3, {"mean": (0.5, 0.5), "std": (0.5,)}, ["--mean has 2 numbers", "three for red, green and blue"]),
        (4, {"mean": (0.5,) * 3, "std": (0.5,)}, ["--mean has 3 numbers", "one, or 4 for the channels"]),
        (4, {"mean": (0.5,), "std": (0.5,) * 5}, ["--std has 5 numbers"]),
        (4, {"grayscale": 0.2}, ["--grayscale is for red, green and blue, and --channels is 4"]),
        (1, {"normalization": "imagenet"}, ["--normalization imagenet", "--channels is 1", "--normalization scan"]),
    ],
)
def test_a_switch_that_the_channels_do_not_have_is_refused(channels: int, switches: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(data=DataConfig(channels=channels), augment=AugmentConfig(**switches))
    assert [word for word in words if word not in str(caught.value)] == []


def test_other_channels_leave_out_what_only_colours_have_and_say_so() -> None:
    config = AugmentConfig(aug="v2", mean=(0.5,), std=(0.1, 0.2, 0.3, 0.4), blur=0.1)
    own = augmentation_of(config, 4)
    changes = {"saturation": 0.0, "hue": 0.0, "grey_p": 0.0, "blur_p": 0.1}
    assert own == replace(AUGMENTATIONS["v2"], mean=(0.5,) * 4, std=(0.1, 0.2, 0.3, 0.4), **changes)
    said = "augmentation v2; without saturation, hue and greyscale, which only red, green and blue have; blur with"
    assert describe(config, 4).startswith(said)
    with pytest.raises(ConfigError, match="no usual mean and std of 4 channels"):
        augmentation_of(AugmentConfig(aug="v2"), 4)
