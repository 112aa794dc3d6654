"""Images of a folder for use with a backbone, opened as in training.

H, W height and width of an image · S side of a view
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmoco.config.checks import known
from fastmoco.config.data import ImagesConfig
from fastmoco.errors import ConfigError
from pipelines.data.dataset import ImageIndex, load_dataset
from pipelines.errors import DataError


class Images(Dataset[tuple[Tensor, int]]):
    """What `open_images` returns: N items (view, label), of which the label is -1 where there is none.

    paths    N names: absolute paths, or those of the records of an archive
    labels   N classes as numbers, -1 without
    classes  their names; empty without labels
    """

    def __init__(self, parts: Sequence[ImageIndex], preprocess: Callable[[Tensor], Tensor] | None) -> None:
        self._parts, self._preprocess = parts, preprocess
        self._ends = np.cumsum([len(part) for part in parts])
        self.paths = [part.path(i) for part in parts for i in range(len(part))]
        self.classes: tuple[str, ...] = next((part.class_names for part in parts if part.class_names), ())
        unknown = [np.full(len(part), -1) if part.labels is None else part.labels for part in parts]
        self.labels: list[int] = np.concatenate(unknown).tolist()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def image(self, position: int) -> Tensor:
        """(3, H, W) uint8 RGB, upright. Raises DataError with the name and the reason for an unusable file."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"there is no image {position} of {len(self)}")
        position %= len(self)
        part = int(np.searchsorted(self._ends, position, side="right"))
        first = 0 if part == 0 else int(self._ends[part - 1])
        pixels = self._parts[part].read(position - first)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image = self.image(position)
        return image if self._preprocess is None else self._preprocess(image), self.labels[position]

    def __repr__(self) -> str:
        kind = f"{len(self.classes)} classes" if self.classes else "no labels"
        return f"Images: {len(self)} of {kind}; images[0] is (view, label), .paths .labels .classes"


def open_images(
    data: str | os.PathLike[str] | Sequence[str],
    preprocess: Callable[[Tensor], Tensor] | None = None,
    *,
    split: Literal["train", "test"] | None = None,
    **settings: Any,
) -> Images:
    """The images of a folder as a `torch.utils.data.Dataset` of (view, label), opened as in training.

        >>> import torch
        >>> from fastmoco import load_backbone, open_images
        >>> backbone, preprocess = load_backbone("runs/photos")
        >>> photos = open_images("photos", preprocess)
        >>> len(photos), photos.classes
        (32, ('cats', 'dogs'))
        >>> with torch.inference_mode():
        ...     features = torch.cat([backbone(views) for views, _ in torch.utils.data.DataLoader(photos, 16)])
        >>> features.shape
        torch.Size([32, 512])

    Files of more than 8 bits keep their high byte or the value range that is given, EXIF orientation is applied, grey
    images and palettes become colours: as `pipelines.data.decode` says. PIL, which torchvision's `ImageFolder` uses,
    saturates 16-bit images.

    data        anything that --data takes: a folder of images or of class folders, a list file, tar archives, a name
    preprocess  (3, H, W) uint8 → a view, as from `load_backbone`; None gives the images themselves
    split       the train or test images only (None: all, train first)
    settings    the flags of `fastmoco train` for images, with underscores: value_range, limit, no_labels, ...

    Raises DataError if there are no images or one is unusable when it is read, ConfigError for a split that is absent
    and for a setting that is none.
    """
    sources = [os.fspath(data)] if isinstance(data, str | os.PathLike) else [os.fspath(one) for one in data]
    for name in settings:
        known(name, ImagesConfig.__dataclass_fields__, "setting of images")
    options = ImagesConfig(data=tuple(sources), **settings)
    dataset = load_dataset(options.data, **options.loading())
    parts = {"train": dataset.train, "test": dataset.test}
    if split is not None and parts.get(split) is None:
        there = " and ".join(name for name, part in parts.items() if part is not None)
        raise ConfigError(f"split is {split!r}, and {sources[0]} has {there} images")
    wanted = [part for name, part in parts.items() if part is not None and split in (None, name)]
    if not any(len(part) for part in wanted):
        raise DataError(f"{sources[0]} holds no images")
    return Images(wanted, preprocess)
