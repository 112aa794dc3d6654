"""Settings of the images: which they are, and how they are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from fastmoco.config.checks import check_types, require
from fastmoco.config.choices import AutoPipeline
from fastmoco.config.flags import REPEATED
from fastmoco.errors import ConfigError
from pipelines.data.decoding import Decoding, Truncated


def _is_value_range(values: tuple[float, float]) -> bool:
    """Whether (low, high) are finite and in order."""
    return math.isfinite(values[0]) and math.isfinite(values[1]) and values[0] < values[1]


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Which images, and how they are read: the same for every command that reads images."""

    data: Annotated[tuple[str, ...], REPEATED]
    """Folder of images, list file, archives or name; shapes (generated), cifar10, ..., a .beton. Can be repeated."""
    train_folder: str | None = None
    """Folder to train on, in --data or absolute (None: its train, if there is val or test too, or all of it)."""
    test_folder: str | None = None
    """Folder to evaluate on, in --data or absolute (None: its val, validation, test, ... beside train)."""
    no_labels: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Do not use labels: folders are no classes."""
    limit: int | None = None
    """Maximum number of images of each split, stratified by class (None: all)."""
    bad_images: Literal["error", "quarantine"] = "error"
    """Unreadable images: stop with an error, or leave them out and list them."""
    truncated: Truncated = "error"
    """Images whose last pixels are missing: bad images, or used with grey or black in their place."""
    value_range: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Values of black and white in images of more than 8 bits, e.g. 0 4095 (None: the full range of the type)."""
    channels: int = 3
    """Channels of an image: 3 is RGB, 1 is grey, other numbers are the bands of the files (TIFF, .npy, alpha)."""
    data_root: str = "~/.cache/fastmoco"
    """Folder for downloaded data sets and caches."""

    def __post_init__(self) -> None:
        if isinstance(self.data, str):  # as configurations of before several were possible say it
            object.__setattr__(self, "data", (self.data,))
        check_types(self)
        expected = "a folder, a list file or the name of a data set"
        require(self, "data", lambda v: all(name != "" and "\0" not in name for name in v), expected)
        for name in ("train_folder", "test_folder"):
            require(self, name, lambda v: v != "" and "\0" not in v, "a folder")
            if getattr(self, name) is not None and len(self.data) > 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is a folder in one --data, and there are {len(self.data)}: leave it out")
        require(self, "limit", lambda v: v > 0, "a number of images above 0")
        require(self, "channels", lambda v: 1 <= v <= 4096, "1 to 4096", "3 is red, green and blue")
        require(self, "value_range", _is_value_range, "two numbers, the first below the second, e.g. 0 4095")

    def finding(self) -> dict[str, Any]:
        """The arguments of `pipelines.data.find.find_files` after `data`."""
        names = ("data_root", "train_folder", "test_folder")
        return {name: getattr(self, name) for name in names} | {"labels": not self.no_labels}

    @property
    def decoding(self) -> Decoding:
        """How encoded images become pixels."""
        return Decoding(self.value_range, self.truncated, self.channels)

    def loading(self) -> dict[str, Any]:
        """The arguments of `pipelines.data.dataset.load_dataset` after `data`."""
        return self.finding() | {"limit": self.limit, "bad_images": self.bad_images, "decoding": self.decoding}


@dataclass(frozen=True, kw_only=True)
class DataConfig(ImagesConfig):
    """The images and how they are loaded."""

    data: Annotated[tuple[str, ...], REPEATED] = ("shapes",)
    """Folder of images, list file, archives or name; shapes (generated), cifar10, ..., a .beton. Can be repeated."""
    pipeline: AutoPipeline = "auto"
    """Decoding and augmentation (auto: by data and device; reported at start)."""
    workers: int | None = None
    """Decoding threads or processes of each rank (None: from the number of CPU cores)."""
    order: Literal["any", "archives"] = "any"
    """Shuffle all images, or tar archive by archive with a shuffle buffer, for disks with slow random access."""
    order_buffer: int = 10_000
    """Size of the shuffle buffer of --order archives, in images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "data", lambda v: len(v) > 0, "a folder, a list file or the name of a data set")
        require(self, "order_buffer", lambda v: v >= 0, "0 images or more")
        require(self, "workers", lambda v: v >= 0, "0 or more")
