"""The arguments of `fastmoco train`: a recipe, data, a file of settings and flags, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastmoco.config import RunConfig
from fastmoco.config.arguments import parse, read, written
from fastmoco.config.flags import Argument, flags_of
from fastmoco.config.resume import as_settings
from fastmoco.config.resume_flags import read_config_file, replanned, saved_config, without_path
from fastmoco.errors import ConfigError
from fastmoco.model.architectures import is_named
from fastmoco.recipes import recipe, recipe_and_data

TRAIN_DESCRIPTION = """Pretrain a backbone with momentum contrast (MoCo) on unlabelled images.

RECIPE (fastmoco recipes lists them) or --config FILE sets the defaults, and flags override them. What is not given
suits the images and the machine, and is printed with the reason: most of it is that of the closest of the recipes
shapes, cifar10-demo and imagenet-v1. Flags have the names of facebookresearch/moco; those of other trainers work too.

  fastmoco train ~/photos                   on a folder of images, of any depth
  fastmoco train cifar10-demo --epochs 400  a recipe, for longer
  fastmoco train --resume runs/NAME         go on where a run stopped"""


class TrainArguments(NamedTuple):
    """recipe         the name of the recipe, if one is given
    config         see `parse_train`
    from_recipe    fields of the recipe that have no flag; a file with a configuration has none of them
    repeats_a_run  whether --config is the file of a run, whose folder must not be used again
    """

    recipe: str | None
    config: RunConfig
    from_recipe: frozenset[str] = frozenset()
    repeats_a_run: bool = False


def parse_train(argv: Sequence[str]) -> RunConfig:
    """Parse `[RECIPE] [DATA] [--config FILE] [FLAGS]`, in any order.

    Fields without a flag are those of FILE, else with --resume or --resume-from of that run's config.json, else of
    RECIPE, else the defaults. Raises ConfigError; exits for --help.
    """
    return train_arguments(argv).config


def train_arguments(argv: Sequence[str]) -> TrainArguments:
    """What the arguments of `fastmoco train` say. Raises as `parse_train`."""
    arguments = read(without_path(list(argv)), flags_of(RunConfig).and_value("--config"), "train")
    name, data = recipe_and_data([word for a in arguments if not a.flag for word in a.values])
    if data and any(a.flag == "--data" for a in arguments):
        raise ConfigError(f"{data[0]!r} and --data both say what to train on: drop one of the two")
    given = [a for a in arguments if a.flag not in ("", "--config")]
    if data:
        given.append(Argument("--data", *data))
    words, file = written(given), _value(arguments, "--config")
    saved = saved_config(words)
    if file is not None:
        default = read_config_file(Path(file))
    elif saved is not None:
        default = saved
    else:
        default = RunConfig() if name is None else recipe(name)
        if is_named(_value(arguments, "--arch")):  # which are taken as they are, whatever the recipe says of its ResNet
            default = default.replace(stem="auto", width=1.0)
    config = _parse(words, default)
    if file is not None:
        again = not any(argument.flag in ("--out", "--resume", "--overwrite") for argument in given)
        return TrainArguments(name, config, repeats_a_run=again)
    if saved is not None:
        return TrainArguments(name, replanned(config, saved, words))
    flags = {argument.flag.removeprefix("--").replace("-", "_") for argument in given}
    return TrainArguments(name, config, frozenset() if name is None else frozenset(config.flat().keys() - flags))


def _parse(argv: list[str], default: RunConfig) -> RunConfig:
    return parse(
        RunConfig,
        argv,
        command="train",
        usage="[RECIPE] [DATA ...] [--config FILE] [FLAGS]",
        description=TRAIN_DESCRIPTION,
        default=as_settings(default),
    )


def _value(arguments: Sequence[Argument], flag: str) -> str | None:
    """The last value of a flag, None if it is not given."""
    return next((argument.values[0] for argument in reversed(arguments) if argument.flag == flag), None)
