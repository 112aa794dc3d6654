"""Named configurations: functions that return a `Recipe`; `fastmoco recipes` shows their one-line docstrings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fastmoco.config import RunConfig
from fastmoco.errors import ConfigError
from fastmoco.recipes.ablations import PUBLISHED, ablation_mechanism, ablation_momentum, ablation_queue
from fastmoco.recipes.entry import Expected, Measured, Published, Recipe
from fastmoco.recipes.photographs import (
    imagenet_mini,
    imagenet_v1,
    imagenet_v1_resnext50,
    imagenet_v1_wide2,
    imagenet_v1_wide4,
    imagenet_v2,
    imagenet_v2_800,
    imagenette_blog,
    imagenette_tuned,
    imagewoof_blog,
)
from fastmoco.recipes.small_images import (
    byol_aug,
    cifar10_demo,
    cifar10_demo_symmetric,
    cifar10_mlp,
    emnist,
    mnist,
    shapes,
)
from pipelines.data.names import NAMES
from pipelines.errors import DataError
from pipelines.suggest import closest

__all__ = ["PUBLISHED", "RECIPES", "Expected", "Measured", "Published", "Recipe", "check_data", "entry", "recipe"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    "shapes": shapes,
    "cifar10-demo": cifar10_demo,
    "cifar10-demo-symmetric": cifar10_demo_symmetric,
    "cifar10-mlp": cifar10_mlp,
    "byol-aug": byol_aug,
    "mnist": mnist,
    "emnist": emnist,
    "imagenette-blog": imagenette_blog,
    "imagenette-tuned": imagenette_tuned,
    "imagewoof-blog": imagewoof_blog,
    "imagenet-mini": imagenet_mini,
    "imagenet-v1": imagenet_v1,
    "imagenet-v1-resnext50": imagenet_v1_resnext50,
    "imagenet-v1-wide2": imagenet_v1_wide2,
    "imagenet-v1-wide4": imagenet_v1_wide4,
    "imagenet-v2": imagenet_v2,
    "imagenet-v2-800": imagenet_v2_800,
    "ablation-momentum": ablation_momentum,
    "ablation-mechanism": ablation_mechanism,
    "ablation-queue": ablation_queue,
}


def entry(name: str) -> Recipe:
    """The recipe of this name. Raises ConfigError with the closest name."""
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ConfigError(f"unknown recipe {name!r}; did you mean {closest(name, RECIPES)!r}? (known: {known})")
    return RECIPES[name]()


def recipe(name: str) -> RunConfig:
    """The configuration of the recipe of this name. Raises ConfigError with the closest name."""
    return entry(name).config


def check_data(name: str, config: RunConfig) -> None:
    """Raise DataError, with instructions to get the data, if the recipe's own image folder is used and missing."""
    chosen, data = entry(name), config.data.data
    if data == chosen.config.data.data and data not in NAMES and not Path(os.path.expanduser(data)).exists():
        raise DataError(f"there is no ./{data}, which recipe {name} trains on: {chosen.data}")
