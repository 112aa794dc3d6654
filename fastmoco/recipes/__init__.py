"""Named configurations: functions that return a `Recipe`; `fastmoco recipes` shows their one-line docstrings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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

__all__ = [
    "PUBLISHED",
    "RECIPES",
    "Expected",
    "Measured",
    "Published",
    "Recipe",
    "check_data",
    "entry",
    "recipe",
    "recipe_and_data",
]

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


_FILES = (".tar", ".beton", ".txt", ".csv", ".tsv", ".lst", ".list")  # of archives and lists, as far as names tell


def entry(name: str) -> Recipe:
    """The recipe of this name. Raises ConfigError with the closest name."""
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise ConfigError(f"unknown recipe {name!r}; did you mean {closest(name, RECIPES)!r}? (known: {known})")
    return RECIPES[name]()


def recipe(name: str) -> RunConfig:
    """The configuration of the recipe of this name. Raises ConfigError with the closest name."""
    return entry(name).config


def recipe_and_data(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe and the data that `[RECIPE] [DATA ...]` names, the arguments of a command that have no flag.

    The first word is a recipe if there is one of this name, else data as all others: a path that exists, anything that
    can only be a path (`~/photos`, `photos/`, `list.csv`, `train-{000..146}.tar`), or the name of a data set. `./NAME`
    is a folder that has the name of a recipe. Raises ConfigError with the closest name.
    """
    name = words[0] if words and words[0] in RECIPES else None
    data = list(words[name is not None :])
    for word in data:
        is_path = os.path.exists(os.path.expanduser(word)) or os.sep in word or word.startswith(("~", "."))
        is_path = is_path or os.path.splitext(word)[1].lower() in _FILES or any(sign in word for sign in "{*?[")
        if word in RECIPES:
            raise ConfigError(f"{word!r} is a recipe and comes first; for a folder of this name use ./{word}")
        if not is_path and word not in NAMES:
            folders = [entry.name for entry in os.scandir() if entry.is_dir()]
            close = closest(word, [*RECIPES, *NAMES, *folders], cutoff=0.5)
            advice = f"did you mean {close!r}? (see fastmoco recipes)" if close else "see fastmoco recipes"
            raise ConfigError(f"unknown recipe, data set or folder {word!r}; {advice}")
    return name, data


def check_data(name: str, config: RunConfig) -> None:
    """Raise DataError, with instructions to get the data, if the recipe's own image folder is used and missing."""
    chosen = entry(name)
    if config.data.data != chosen.config.data.data:
        return
    for data in config.data.data:
        if data not in NAMES and not Path(os.path.expanduser(data)).exists():
            raise DataError(f"there is no ./{data}, which recipe {name} trains on: {chosen.data}")
