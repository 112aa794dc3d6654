"""The folders of runs that have no --out."""

from __future__ import annotations

import os
import re
from itertools import count
from pathlib import Path

from fastmoco.config import RunConfig


def default_run_name(config: RunConfig) -> str:
    """Folder name of a run, of letters, digits, dots and dashes: `cifar10-resnet18-200ep-seed0`."""
    names = [os.path.basename(os.path.abspath(name)) for name in config.data.data]
    data = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(names)).strip("-.")[:40].rstrip("-.")
    arch = None if config.model.arch is None else re.sub(r"[^A-Za-z0-9._-]+", "-", config.model.arch)
    epochs = f"{config.optim.epochs}ep" if config.optim.epochs is not None else None
    return "-".join(part for part in (data or "images", arch, epochs, f"seed{config.run.seed}") if part)


def folder_of(config: RunConfig) -> Path:
    """The folder of a run: --out, or runs/NAME."""
    return Path(config.run.out) if config.run.out else Path("runs") / default_run_name(config)


def unused_folder(config: RunConfig) -> Path:
    """The first of runs/NAME-2, runs/NAME-3, ... that does not exist."""
    folders = (Path("runs") / f"{default_run_name(config)}-{number}" for number in count(2))
    return next(folder for folder in folders if not folder.exists())
