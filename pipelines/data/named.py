"""Data sets by name: downloaded and verified by torchvision, or drawn in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pipelines.data.index import Dataset, ImageIndex
from pipelines.data.shapes import CLASS_NAMES, TEST_COUNT, TRAIN_COUNT, make_shapes
from pipelines.errors import DataError

IMAGENETTE_COUNTS = {"train": 9_469, "val": 3_925}


def shapes() -> Dataset:
    """4,000 and 1,000 drawn images of 32 × 32 in ten classes; nothing is downloaded."""
    train, test = make_shapes(TRAIN_COUNT), make_shapes(TEST_COUNT, start=TRAIN_COUNT)
    return Dataset(
        ImageIndex.from_pixels("shapes/train", *train, CLASS_NAMES),
        ImageIndex.from_pixels("shapes/test", *test, CLASS_NAMES),
    )


def array_dataset(name: str, root: Path) -> Dataset:
    """A data set of `names.ARRAYS` from the folder `root`, downloaded first if it is missing."""
    load = LOADERS[name]
    return load(name, root)


def imagenette_folders(root: Path) -> tuple[Path, tuple[str, ...]]:
    """(the folder with Imagenette's `train` and `val` at full size, the ten class names in folder order)."""
    first = _torchvision("Imagenette", root, split="train", size="full")
    folder = root / "imagenette2"
    for split, expected in IMAGENETTE_COUNTS.items():
        count = sum(len(files) for _, _, files in os.walk(folder / split))
        if count < expected:  # torchvision accepts any folder of that name, even one half unpacked
            raise DataError(
                f"{folder / split} holds {count:,} files, expected {expected:,}: unpacking was interrupted; "
                f"delete {folder} and try again"
            )
    return folder, tuple(names[0] for names in first.classes)


def _cifar(name: str, root: Path) -> Dataset:
    def split(train: bool) -> ImageIndex:
        data = _torchvision(name.upper(), root, train=train)
        return ImageIndex.from_pixels(f"{name}/{_split(train)}", data.data, data.targets, tuple(data.classes))

    return Dataset(split(True), split(False))


def _mnist(name: str, root: Path) -> Dataset:
    kind, options = {
        "mnist": ("MNIST", {}),
        "fashion-mnist": ("FashionMNIST", {}),
        "emnist": ("EMNIST", {"split": "balanced"}),  # 47 classes of equal size: similar letters are merged
        "emnist-byclass": ("EMNIST", {"split": "byclass"}),  # digits, capitals and small letters: 62 classes
    }[name]

    def split(train: bool) -> ImageIndex:
        data = _torchvision(kind, root, train=train, **options)
        grey = data.data.numpy()
        if kind == "EMNIST":
            grey = grey.transpose(0, 2, 1)  # it is distributed transposed
        pixels = np.repeat(grey[..., None], 3, axis=3)
        return ImageIndex.from_pixels(f"{name}/{_split(train)}", pixels, data.targets.numpy(), tuple(data.classes))

    return Dataset(split(True), split(False))


def _stl10(name: str, root: Path) -> Dataset:
    """Pretrains on the 100,000 unlabelled and the 5,000 labelled images; the labelled ones are the bank."""
    labelled, test, unlabelled = (_torchvision("STL10", root, split=split) for split in ("train", "test", "unlabeled"))
    count = len(labelled.data)
    pixels = np.empty((count + len(unlabelled.data), 96, 96, 3), dtype=np.uint8)  # 2.9 GB: filled, not concatenated
    pixels[:count] = labelled.data.transpose(0, 2, 3, 1)
    pixels[count:] = unlabelled.data.transpose(0, 2, 3, 1)
    test_pixels = np.ascontiguousarray(test.data.transpose(0, 2, 3, 1))
    classes = tuple(labelled.classes)
    return Dataset(
        ImageIndex.from_pixels(f"{name}/train+unlabeled", pixels),
        ImageIndex.from_pixels(f"{name}/test", test_pixels, test.labels, classes),
        bank=ImageIndex.from_pixels(f"{name}/train", pixels[:count], labelled.labels, classes),
    )


LOADERS: dict[str, Callable[[str, Path], Dataset]] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "stl10": _stl10,
    "mnist": _mnist,
    "fashion-mnist": _mnist,
    "emnist": _mnist,
    "emnist-byclass": _mnist,
}


def _torchvision(kind: str, root: Path, **options: Any) -> Any:
    """torchvision's data set class `kind` with its files in `root`, downloaded and verified if missing."""
    from torchvision import datasets  # slow to import, and only needed by named data sets

    try:
        root.mkdir(parents=True, exist_ok=True)
        return getattr(datasets, kind)(str(root), download=True, **options)
    except (OSError, RuntimeError, HTTPException, EOFError, TarError, BadZipFile) as error:  # network, space, checksum
        reason = " ".join(str(error).split())
        raise DataError(
            f"{kind} is not in {root} and could not be downloaded ({reason}); check the network and disk space, or "
            f"copy the files there from a machine that has them"
        ) from error


def _split(train: bool) -> str:
    return "train" if train else "test"
