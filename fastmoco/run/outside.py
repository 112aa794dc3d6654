"""Keeps what a command writes out of the data set, where its pictures would be images from then on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fastmoco.errors import ConfigError
from pipelines.data.files import TEST_FOLDERS
from pipelines.data.names import NAMES


def check_outside(folder: Path, data: str) -> None:
    """Raise ConfigError if a folder to write to, which need not exist, is the folder of images `data` or is in it.

    Links on the way to either are followed, and so are the links to folders in `data` or its splits.
    """
    root = Path(data).expanduser()
    if data in NAMES or not root.is_dir():
        return
    named, real = folder.expanduser().absolute(), Path(os.path.realpath(folder.expanduser()))
    within = {os.path.realpath(part) for part in (named, *named.parents, real, *real.parents)}
    if any(part in within for part in _folders(root)):
        raise ConfigError(
            f"{folder} is in the folder of images {root}, where its pictures would be trained on: choose another "
            "with --out"
        )


def _folders(root: Path) -> Iterator[str]:
    """The real paths of a folder of images, and of the folders that links in it or in its splits lead to."""
    yield os.path.realpath(root)
    for folder in (root, *(root / name for name in ("train", *TEST_FOLDERS))):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                yield from (os.path.realpath(entry.path) for entry in entries if entry.is_symlink() and entry.is_dir())
