"""Named runs: functions that return a `Recipe`, their docstring in one line what it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
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
    """A named recipe. Raises ConfigError with the nearest name."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1, cutoff=0)
        raise ConfigError(f"unknown recipe {name!r}; did you mean {near[0]!r}? (known: {', '.join(RECIPES)})")
    return RECIPES[name]()


def recipe(name: str) -> RunConfig:
    """The configuration of a named recipe. Raises ConfigError with the nearest name."""
    return entry(name).config


def check_data(name: str, config: RunConfig) -> None:
    """Raises DataError, with where to get it, if the recipe's own folder of images is to be used and is not there."""
    own, data = entry(name), config.data.data
    if data == own.config.data.data and data not in NAMES and not Path(os.path.expanduser(data)).exists():
        raise DataError(f"there is no ./{data}, and the recipe {name} trains on that: {own.data}")
