"""What `--init` decides before a run is resolved: the weights to begin from, and the settings that follow from them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmoco.config import ModelConfig, RunConfig
from fastmoco.errors import ConfigError
from fastmoco.model.init_weights import InitWeights
from fastmoco.run.directory import read_config

ReadInit = Callable[[str, str | None, str | None], InitWeights]
"""(path, prefix, arch) → its weights, see `backbones.read.read_init`. Raises CheckpointError and ConfigError."""


def initial(config: RunConfig, read: ReadInit) -> tuple[InitWeights | None, dict[str, Any]]:
    """The weights of `--init` and the fields that follow from them.

    A run that is resumed has no weights to begin from, and its fields are those of its first start; the file is not
    needed any more. Raises ConfigError where other settings, or weights other than the run began with, were given.
    """
    model = config.model
    assert model.init is not None
    folder = Path(os.path.expanduser(config.run.out or ""))
    if not (config.run.resume and config.run.out and (folder / "config.json").is_file()):
        weights = read(model.init, model.init_prefix, model.arch)
        return None if config.run.resume else weights, weights.settings(config)
    began = read_config(folder).model
    if not _began_from(model, began, read):
        raise ConfigError(
            f"--init {model.init} is not what the run in {folder} began from ({began.init or 'random weights'}): "
            "resume without --init, or start a new run with another --out"
        )
    fields = {"init_sha256": began.init_sha256}
    fields |= {"arch": began.arch} if model.arch is None else {}
    fields |= {"stem": began.stem} if model.stem == "auto" else {}
    return None, fields | ({"width": began.width} if model.width == 1 else {})


def _began_from(model: ModelConfig, began: ModelConfig, read: ReadInit) -> bool:
    """Whether the weights that are named now are those of the first start, as far as the file is still there."""
    if began.init is None or model.init is None:
        return False
    if (model.init, model.init_prefix) == (began.init, began.init_prefix):
        return True
    if not os.path.exists(os.path.expanduser(model.init)):
        return True
    return read(model.init, model.init_prefix, model.arch).sha256 == began.init_sha256
