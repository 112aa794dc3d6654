"""Keeps what a command writes apart from the images of a data set.

Folders of runs, sweeps and evaluations, and pictures that fastmoco writes under their usual names, are recognised when
a data set is listed (`pipelines.data.own_outputs`), so they may be among the images. Anything else would become one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastmoco.errors import ConfigError
from pipelines.data.files import holds_image
from pipelines.data.layout import find_splits
from pipelines.data.names import NAMES
from pipelines.data.own_outputs import is_own_picture, is_picture_name


def check_outside(folder: Path, data: Sequence[str]) -> None:
    """Raise ConfigError if a folder to write to, which need not exist, is one of images of `data`.

    A folder among the images is none if it is new, or holds no images but pictures of fastmoco.
    """
    for root in _image_folders(data):
        if not _is_within(folder, root):
            continue
        if _real(folder) in _folders(root) or (folder.expanduser().is_dir() and holds_image(str(folder.expanduser()))):
            raise ConfigError(
                f"{folder} holds images of {root}, among which its pictures would be trained on: choose another with "
                "--out"
            )


def check_picture(path: Path, data: Sequence[str]) -> None:
    """Raise ConfigError if a picture to write would be an image of `data` from then on, or replace one."""
    for root in _image_folders(data):
        if not _is_within(path.parent, root):
            continue
        if not is_picture_name(path.name):
            raise ConfigError(
                f"{path} is in the folder of images {root}, where it would be trained on: choose another folder with "
                "--out, or the name views.png"
            )
        if path.exists() and not is_own_picture(str(path)):
            raise ConfigError(f"{path} is an image of {root}: choose another name with --out")


def _image_folders(data: Sequence[str]) -> list[Path]:
    roots = [Path(one).expanduser() for one in data if one not in NAMES]
    return [root for root in roots if root.is_dir()]


def _is_within(folder: Path, root: Path) -> bool:
    """Whether a path is `root` or in it. Links on the way to either are followed, and so are those to folders in it."""
    named, real = folder.expanduser().absolute(), Path(_real(folder))
    within = {os.path.realpath(part) for part in (named, *named.parents, real, *real.parents)}
    return any(part in within for part in _folders(root))


def _folders(root: Path) -> Iterator[str]:
    """The real paths of a folder of images, and of the folders that links in it or in its splits lead to."""
    yield _real(root)
    below = [entry.path for entry in os.scandir(root) if entry.is_dir()]
    train, tests = find_splits(below)
    for folder in (root, *([] if train is None else [train]), *tests):
        with os.scandir(folder) as entries:
            yield from (_real(entry.path) for entry in entries if entry.is_symlink() and entry.is_dir())


def _real(path: str | Path) -> str:
    return os.path.realpath(os.path.expanduser(path))
