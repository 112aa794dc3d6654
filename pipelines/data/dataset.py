"""Opens a data set for pretraining and evaluation: a folder, a list of paths, archives, or a name."""

from __future__ import annotations

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
from pipelines.suggest import closest

__all__ = ["BadImages", "DataFiles", "Dataset", "ImageIndex", "find_files", "load_dataset"]

BadImages = Literal["error", "quarantine"]
MAX_BAD_FRACTION = 0.1  # above this it is not a few bad files but the wrong folder, or a broken disk


def load_dataset(
    data: str, *, data_root: str | Path, limit: int | None = None, bad_images: BadImages = "error"
) -> Dataset:
    """The data set that `data` names.

    data        a name in `names.NAMES` (which takes precedence over a folder of that name: write `./cifar10` for the
                folder); a folder that contains `train` and `val`, class folders, or images at any depth (`data.files`);
                a text file of paths; tar archives, a folder of them or a pattern such as
                `train-{000..146}.tar` (`tar_shards`); or a `.beton` file of `tools/make_ffcv.py`; the test split of a
                train.beton is val.beton, valid.beton, validation.beton or test.beton in the same folder
    data_root   the folder that named data sets are downloaded to
    limit       maximum number of images per split: spread over the classes, or evenly over the order without labels
    bad_images  for an unusable file: raise an error, or leave it out and record it in the ledger

    Raises DataError with the actual value, what was expected, and the remedy.
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
    splits = [_index(split, name, files.class_names, limit, bad_images, known) for split, name in named]
    return Dataset(
        *(split.images for split in splits),
        quarantine=tuple(entry for split in splits for entry in split.left_out),
        skipped=sum(split.skipped for split in splits),
        indexing="" if known is None else _indexing(sum(split.opened for split in splits)),
    )


def _from_beton(path: Path) -> Dataset:
    tests = [path.with_name(f"{name}.beton") for name in TEST_FOLDERS] if path.name == "train.beton" else []
    test = next((candidate for candidate in tests if candidate.exists()), None)
    return Dataset(read_index(str(path)), None if test is None else read_index(str(test)))


def _from_shards(shards: Shards, limit: int | None, bad_images: BadImages) -> Dataset:
    splits = [_shards_split(archives, limit, bad_images) for archives in shards if archives]
    if len(splits) == 2:
        train, test = (split.images for split in splits)
        if train.labels is not None and test.labels is not None and train.class_names != test.class_names:
            raise DataError(
                f"the archives of {printable(train.name)} and {printable(test.name)} have different classes "
                f"({len(train.class_names)} and {len(test.class_names)}); expected the same, or a classes.txt"
            )
    return Dataset(
        *(split.images for split in splits),
        quarantine=tuple(entry for split in splits for entry in split.left_out),
        skipped=sum(split.skipped for split in splits),
    )


def _shards_split(archives: tuple[str, ...], limit: int | None, bad_images: BadImages) -> _Split:
    members = list_members(archives)
    labels, class_names = labels_of(archives, members.files)
    positions = limit_positions(len(members.files.paths), labels, limit)
    records = members.records.select(positions)
    sizes, bad = read_sizes(records)
    selected = None if labels is None else labels[positions]
    name = os.path.join(os.path.basename(os.path.dirname(archives[0])), os.path.basename(archives[0]))
    index = ImageIndex(name, sizes, selected, class_names, records=records)
    return _without_bad(index, bad, bad_images, skipped=members.files.skipped, opened=len(positions))


@dataclass(frozen=True, eq=False)
class DataFiles:
    """The files of a data set, before any of them is opened.

    path         the folder or list file, absolute; a manifest belongs to it
    train, test  the files for pretraining, and those for evaluation or None; with their display names
    class_names  display names of the classes, if different from the folder names
    """

    path: str
    train: ImageFiles
    train_name: str
    test: ImageFiles | None = None
    test_name: str = ""
    class_names: tuple[str, ...] = ()


def find_files(data: str, *, data_root: str | Path) -> DataFiles:
    """The files of `data`, as in `load_dataset`. Raises DataError, also if the data set is not stored as files."""
    root = Path(data_root).expanduser()
    if data == "shapes" or data in ARRAYS:
        kind = "drawn in memory" if data == "shapes" else "downloaded as one verified archive"
        raise DataError(f"{data} is {kind} and has no image files; expected a folder, a list of paths, or imagenette")
    if data == "imagenette":
        folder, class_names = imagenette_folders(root)
        return replace(_in_folder(str(folder), data), class_names=class_names)
    path = os.path.abspath(os.path.expanduser(data))
    if data.endswith(".beton"):
        raise DataError(f"{printable(data)} holds records, checked when written; expected the original images")
    if os.path.isdir(path):
        return _in_folder(path, os.path.basename(path) or path)
    if os.path.isfile(path):
        return DataFiles(path, read_list(path), os.path.basename(path))
    suggestion = closest(data.lower(), NAMES, cutoff=0.6)
    hint = f"names are {', '.join(NAMES)}" if suggestion is None else f"did you mean {suggestion}?"
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
        return  # one split has no labels, so the classes cannot disagree; an evaluation that needs labels reports it
    in_train, in_test = set(train.classes), set(test.classes)
    if in_train != in_test:
        odd = min(in_train ^ in_test)
        has, lacks = (train_folder, test_folder) if odd in in_train else (test_folder, train_folder)
        raise DataError(
            f"the class '{printable(odd)}' is in {printable(has)} and not in {printable(lacks)} "
            f"({len(in_train)} and {len(in_test)} classes, {len(in_train ^ in_test)} not shared); expected the same "
            f"class folders"
        )


class _Split(NamedTuple):
    """The index of a split, (path, reason) of bad images left out, and the numbers of files skipped and opened."""

    images: ImageIndex
    left_out: tuple[tuple[str, str], ...]
    skipped: int
    opened: int


def _index(
    files: ImageFiles,
    name: str,
    class_names: tuple[str, ...],
    limit: int | None,
    bad_images: BadImages,
    known: ScanManifest | None,
) -> _Split:
    """The index of these files. Opens only files within `limit` that changed since the scan or were not scanned."""
    labels = files.labels()
    positions = limit_positions(len(files.paths), labels, limit)
    paths = [files.paths[i] for i in positions]
    sizes, bad, opened, scanned = (*read_headers(paths), len(paths), None) if known is None else known.headers(paths)
    selected = None if labels is None else labels[positions]
    index = ImageIndex(name, sizes, selected, class_names or files.class_names(), paths=tuple(paths), scanned=scanned)
    return _without_bad(index, bad, bad_images, skipped=files.skipped, opened=opened)


def _without_bad(
    index: ImageIndex, bad: list[tuple[int, str]], bad_images: BadImages, *, skipped: int, opened: int
) -> _Split:
    """The index without the images of `bad`, (position, reason). Raises DataError if more are bad than allowed."""
    allowed = MAX_BAD_FRACTION * len(index) if bad_images == "quarantine" else 0
    if len(bad) > allowed:
        remedy = (
            f"at most {MAX_BAD_FRACTION:.0%} may be left out"
            if bad_images == "quarantine"
            else "fix or remove them, or ask for bad images to be quarantined"
        )
        raise DataError(
            f"{len(bad):,} of {len(index):,} images of {printable(index.name)} are bad; {remedy}. {bad[0][1]}"
        )
    if not bad:
        return _Split(index, (), skipped, opened)
    good = np.delete(np.arange(len(index)), [i for i, _ in bad])
    left_out = tuple((index.path(i), reason) for i, reason in bad)
    return _Split(index.select(good), left_out, skipped, opened)


def _indexing(opened: int) -> str:
    """Text that describes the source of the image sizes."""
    if opened == 0:
        return "as scanned"
    return f"as scanned, but for {opened:,} new or changed {'file' if opened == 1 else 'files'}"


def limit_positions(count: int, labels: np.ndarray | None, limit: int | None) -> np.ndarray:
    """Positions of the images that a limit keeps, in order: (min(count, limit),) int64.

    With labels, the first of every class, then the second of every class, and so on until `limit` are chosen; without
    labels, evenly spaced ones, so those of a smaller limit need not be among those of a larger one.
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
    """A data set cut to `limit` images per split."""

    def limited(index: ImageIndex | None) -> ImageIndex | None:
        if index is None or limit is None or limit >= len(index):
            return index
        return index.select(limit_positions(len(index), index.labels, limit))

    train = limited(dataset.train)
    assert train is not None
    return Dataset(train, limited(dataset.test), bank=train if dataset.bank is dataset.train else limited(dataset.bank))
