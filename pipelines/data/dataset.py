"""Any input → what to pretrain on and what to evaluate on: a folder, a list of paths, archives, or a name."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pipelines.data import manifest
from pipelines.data.beton import read_index
from pipelines.data.decode import printable
from pipelines.data.files import TEST_FOLDERS, ImageFiles, find_splits, list_folder, read_list
from pipelines.data.headers import read_headers
from pipelines.data.index import Dataset, ImageIndex
from pipelines.data.manifest import ScanManifest
from pipelines.data.named import array_dataset, imagenette_folders, shapes
from pipelines.data.names import ARRAYS, NAMES
from pipelines.data.tar_shards import Shards, find_shards, labels_of, list_members, read_sizes
from pipelines.errors import DataError

__all__ = ["BadImages", "DataFiles", "Dataset", "ImageIndex", "find_files", "load_dataset"]

BadImages = Literal["error", "quarantine"]
MAX_BAD_FRACTION = 0.1  # more than this is no longer a few bad files but the wrong folder, or a broken disk


def load_dataset(
    data: str, *, data_root: str | Path, limit: int | None = None, bad_images: BadImages = "error"
) -> Dataset:
    """The data set that `data` names.

    data        a name of `names.NAMES` (which wins over a folder of that name here: write `./cifar10` for the folder);
                a folder, with `train` and `val` in it, of class folders, or of images at any depth (`image_files`);
                a text file of paths; tar archives, a folder of them or a pattern such as
                `train-{000..146}.tar` (`tar_shards`); or a `.beton` file of `tools/make_ffcv.py`, where val.beton,
                valid.beton, validation.beton or test.beton in the folder of a train.beton is evaluated on
    data_root   where named data sets are downloaded to
    limit       at most so many images of each part, for a trial: spread over the classes, or evenly over the order
    bad_images  what an unusable file does: stop with an error, or leave it out and write it into the ledger

    Raises DataError with what was found, expected, and what to do.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit is {limit} images; expected 1 or more, or none")
    root = Path(data_root).expanduser()
    if data == "shapes":
        return _limited(shapes(), limit)
    if data in ARRAYS:
        return _limited(array_dataset(data, root), limit)
    if data.endswith(".beton"):
        return _limited(_from_beton(Path(data).expanduser().absolute()), limit)
    shards = None if data in NAMES else find_shards(data)
    if shards is not None:
        return _from_shards(shards, limit, bad_images)
    files = find_files(data, data_root=root)
    known = manifest.find(files.path, root)
    named = [(files.train, files.train_name)] + ([] if files.test is None else [(files.test, files.test_name)])
    parts = [_index(part, name, files.class_names, limit, bad_images, known) for part, name in named]
    return Dataset(
        *(part.images for part in parts),
        quarantine=tuple(entry for part in parts for entry in part.ledger),
        skipped=sum(part.skipped for part in parts),
        indexing="" if known is None else _indexing(sum(part.opened for part in parts)),
    )


def _from_beton(path: Path) -> Dataset:
    tests = [path.with_name(f"{name}.beton") for name in TEST_FOLDERS] if path.name == "train.beton" else []
    test = next((candidate for candidate in tests if candidate.exists()), None)
    return Dataset(read_index(str(path)), None if test is None else read_index(str(test)))


def _from_shards(shards: Shards, limit: int | None, bad_images: BadImages) -> Dataset:
    parts = [_shards_part(archives, limit, bad_images) for archives in shards if archives]
    if len(parts) == 2:
        train, test = (part.images for part in parts)
        if train.labels is not None and test.labels is not None and train.class_names != test.class_names:
            raise DataError(
                f"the archives of {printable(train.name)} and {printable(test.name)} have other classes "
                f"({len(train.class_names)} and {len(test.class_names)}); expected the same, or a classes.txt"
            )
    return Dataset(
        *(part.images for part in parts),
        quarantine=tuple(entry for part in parts for entry in part.ledger),
        skipped=sum(part.skipped for part in parts),
    )


def _shards_part(archives: tuple[str, ...], limit: int | None, bad_images: BadImages) -> _Part:
    members = list_members(archives)
    labels, class_names = labels_of(archives, members.files)
    positions = limit_positions(len(members.files.paths), labels, limit)
    records = members.records.select(positions)
    sizes, bad = read_sizes(records)
    some = None if labels is None else labels[positions]
    name = os.path.join(os.path.basename(os.path.dirname(archives[0])), os.path.basename(archives[0]))
    whole = ImageIndex(name, sizes, some, class_names, records=records)
    return _without_bad(whole, bad, bad_images, skipped=members.files.skipped, opened=len(positions))


@dataclass(frozen=True, eq=False)
class DataFiles:
    """The files of a data set, before any of them is opened.

    path   the folder or list file, absolute; a manifest is kept for it
    train  what pretraining sees, and `test` what is evaluated on, or None; with what people call them
    class_names  what people call the classes, where that is not their folders' names
    """

    path: str
    train: ImageFiles
    train_name: str
    test: ImageFiles | None = None
    test_name: str = ""
    class_names: tuple[str, ...] = ()


def find_files(data: str, *, data_root: str | Path) -> DataFiles:
    """The files that `data` stands for, as in `load_dataset`. Raises DataError, also where it is not kept in files."""
    root = Path(data_root).expanduser()
    if data == "shapes" or data in ARRAYS:
        kind = "drawn in memory" if data == "shapes" else "downloaded as one verified archive"
        raise DataError(f"{data} is {kind} and has no image files; expected a folder, a list of paths, or imagenette")
    if data == "imagenette":
        folder, class_names = imagenette_folders(root)
        return replace(_in_folder(str(folder), data), class_names=class_names)
    path = os.path.abspath(os.path.expanduser(data))
    if data.endswith(".beton"):
        raise DataError(f"{printable(data)} holds records, checked when it was written; expected the images it is from")
    if os.path.isdir(path):
        return _in_folder(path, os.path.basename(path) or path)
    if os.path.isfile(path):
        return DataFiles(path, read_list(path), os.path.basename(path))
    close = difflib.get_close_matches(data.lower(), NAMES, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"names are {', '.join(NAMES)}"
    raise DataError(f"{printable(data)} does not exist; expected a folder, a list of paths or a name: {hint}")


def _in_folder(root: str, name: str) -> DataFiles:
    train_folder, test_folder = find_splits(root)
    train = list_folder(train_folder)
    split = "" if train_folder == root else f"/{os.path.basename(train_folder)}"
    if test_folder is None:
        return DataFiles(root, train, name + split)
    test = list_folder(test_folder)
    _check_same_classes(train, train_folder, test, test_folder)
    return DataFiles(root, train, name + split, test, f"{name}/{os.path.basename(test_folder)}")


def _check_same_classes(train: ImageFiles, train_folder: str, test: ImageFiles, test_folder: str) -> None:
    if train.classes is None or test.classes is None:
        return  # one of them is a heap: nothing can disagree, and an evaluation that needs labels says so
    here, there = set(train.classes), set(test.classes)
    if here != there:
        odd = min(here ^ there)
        has, lacks = (train_folder, test_folder) if odd in here else (test_folder, train_folder)
        raise DataError(
            f"the class '{printable(odd)}' is in {printable(has)} and not in {printable(lacks)} "
            f"({len(here)} and {len(there)} classes, {len(here ^ there)} not shared); expected the same class folders"
        )


class _Part(NamedTuple):
    """An index; the images left out of it with their reasons, files passed over, and how many were opened for it."""

    images: ImageIndex
    ledger: tuple[tuple[str, str], ...]
    skipped: int
    opened: int


def _index(
    files: ImageFiles,
    name: str,
    class_names: tuple[str, ...],
    limit: int | None,
    bad_images: BadImages,
    known: ScanManifest | None,
) -> _Part:
    """The index of these files; only those within `limit` are opened, and only where no scan knows them as they are."""
    labels = files.labels()
    positions = limit_positions(len(files.paths), labels, limit)
    paths = [files.paths[i] for i in positions]
    sizes, bad, opened = (*read_headers(paths), len(paths)) if known is None else known.headers(paths)
    some = None if labels is None else labels[positions]
    whole = ImageIndex(name, sizes, some, class_names or files.class_names(), paths=tuple(paths))
    return _without_bad(whole, bad, bad_images, skipped=files.skipped, opened=opened)


def _without_bad(
    whole: ImageIndex, bad: list[tuple[int, str]], bad_images: BadImages, *, skipped: int, opened: int
) -> _Part:
    """The index without the images of `bad`, (position, reason). Raises DataError where none or so many may be bad."""
    allowed = MAX_BAD_FRACTION * len(whole) if bad_images == "quarantine" else 0
    if len(bad) > allowed:
        remedy = (
            f"at most {MAX_BAD_FRACTION:.0%} may be left out"
            if bad_images == "quarantine"
            else "fix or remove them, or ask for bad images to be quarantined"
        )
        raise DataError(
            f"{len(bad):,} of {len(whole):,} images of {printable(whole.name)} are bad; {remedy}. {bad[0][1]}"
        )
    if not bad:
        return _Part(whole, (), skipped, opened)
    good = np.delete(np.arange(len(whole)), [i for i, _ in bad])
    left_out = tuple((whole.path(i), reason) for i, reason in bad)
    return _Part(whole.select(good), left_out, skipped, opened)


def _indexing(opened: int) -> str:
    """How the sizes of the images came to be known, in words."""
    if opened == 0:
        return "as scanned"
    return f"as scanned, but for {opened:,} new or changed {'file' if opened == 1 else 'files'}"


def limit_positions(count: int, labels: np.ndarray | None, limit: int | None) -> np.ndarray:
    """Which of `count` images a limit keeps, in order: (min(count, limit),) int64.

    With labels, the first of every class, then the second of every class, and so on until `limit` are taken; without,
    evenly spaced ones. The images of a smaller limit need not be among those of a larger one without labels.
    """
    if limit is None or limit >= count:
        return np.arange(count)
    if labels is None:
        return np.arange(limit) * count // limit
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    rank = np.empty(count, dtype=np.int64)  # 0 for the first image of its class, 1 for the second
    rank[by_class] = np.arange(count) - starts
    return np.sort(np.lexsort((labels, rank))[:limit])


def _limited(dataset: Dataset, limit: int | None) -> Dataset:
    """A data set in memory, cut to `limit` images a part."""

    def part(index: ImageIndex | None) -> ImageIndex | None:
        if index is None or limit is None or limit >= len(index):
            return index
        return index.select(limit_positions(len(index), index.labels, limit))

    train = part(dataset.train)
    assert train is not None
    return Dataset(train, part(dataset.test), bank=train if dataset.bank is dataset.train else part(dataset.bank))
