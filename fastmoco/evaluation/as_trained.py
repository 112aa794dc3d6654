"""How the images of an evaluation are decoded: as those the backbone was trained on, where nothing else is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fastmoco.backbones.read import LoadedBackbone
from fastmoco.config.data import ImagesConfig
from fastmoco.errors import ConfigError
from fastmoco.run.directory import read_config
from pipelines.files import absolute

Options = TypeVar("Options", bound=ImagesConfig)


def decoded_as_trained(options: Options, backbone: LoadedBackbone, path: str) -> Options:
    """The options with the channels of the backbone, and the decoding of the run that it is of, if there is one.

    path  of the backbone: a run, or a file

    Raises ConfigError where --channels says otherwise.
    """
    if options.channels not in (3, backbone.channels):
        raise ConfigError(
            f"--channels is {options.channels}, and {backbone.origin} reads images of {backbone.channels} channels: "
            "leave it out"
        )
    options = replace(options, channels=backbone.channels)
    run = run_folder(path)
    if run is None:
        return options
    images = read_config(run).data
    truncated = images.truncated if options.truncated == "error" else options.truncated
    return replace(options, value_range=options.value_range or images.value_range, truncated=truncated)


def run_folder(run: str) -> Path | None:
    """The run folder that `run` is or is a file of."""
    path = Path(absolute(run))
    candidates = [path, path.parent, *([path.parent.parent] if path.parent.name == "checkpoints" else [])]
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)
