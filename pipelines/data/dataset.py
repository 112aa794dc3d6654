"""Opens a data set for pretraining and evaluation: a folder, a list of paths, archives, or a name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.data import manifest
from pipelines.data.beton import read_index
from pipelines.data.choices import Choices
from pipelines.data.decode import printable
from pipelines.data.decoding import DEFAULT, Decoding
from pipelines.data.files import ImageFiles
from pipelines.data.find import DataFiles, find_files, join, refuse_folders
from pipelines.data.formats.bands import luma
from pipelines.data.headers import Progress
from pipelines.data.index import Dataset, ImageIndex
from pipelines.data.layout import TESTS, in_common
from pipelines.data.manifest import ScanManifest
from pipelines.data.named import array_dataset, shapes
from pipelines.data.names import ARRAYS, NAMES
from pipelines.data.notes import sampled_span
from pipelines.data.splits import (
    MAX_BAD_FRACTION,
    BadImages,
    Split,
    assemble,
    index_files,
    indexing_text,
    limit_positions,
    positions_within,
    without_bad,
)
from pipelines.data.tar_classes import named_classes
from pipelines.data.tar_shards import Members, Shards, find_shards, inspect_members, list_members
from pipelines.errors import DataError
from pipelines.files import absolute

__all__ = [
    "MAX_BAD_FRACTION",
    "BadImages",
    "DataFiles",
    "Dataset",
    "ImageIndex",
    "find_files",
    "limit_positions",
    "load_dataset",
]


def load_dataset(
    data: str | Sequence[str],
    *,
    data_root: str | Path,
    limit: int | None = None,
    bad_images: BadImages = "error",
    labels: bool = True,
    train_folder: str | None = None,
    test_folder: str | None = None,
    decoding: Decoding = DEFAULT,
    progress: Progress = lambda done, total: None,
) -> Dataset:
    """The data set that `data` names, or all images of several.

    data          a name in `names.NAMES` (which takes precedence over a folder of that name: write `./cifar10` for the
                  folder); a folder of images at any depth, whose folders may be splits and classes (`layout`); a list
                  file (`lists`); tar archives, a folder of them or a pattern such as `train-{000..146}.tar`
                  (`tar_shards`); or a `.beton` file of `tools/make_ffcv.py`; the test split of a train.beton is
                  val.beton or test.beton in the same folder. Several must all be folders and lists, or all archives
    data_root     the folder that named data sets are downloaded to
    limit         maximum number of images per split: spread over the classes, or evenly over the order without labels
    bad_images    for an unusable file: raise an error, or leave it out and record it in the ledger
    labels        False: leave out what is known about classes
    train_folder  folder of the images to train on, and
    test_folder   of those to evaluate on, instead of the guessed ones; absolute, or relative to `data`
    decoding      how encoded images become pixels
    progress      called, of each split, with the number of files or archives opened so far, and of all

    Raises DataError with the actual value, what was expected, and the remedy.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit is {limit} images; expected 1 or more, or none")
    sources = [data] if isinstance(data, str) else list(data)
    root = Path(data_root).expanduser()
    whole = [source for source in sources if _is_whole(source)]
    if whole:
        if len(sources) > 1:
            raise DataError(f"{printable(whole[0])} cannot be joined with other data; expected folders, lists or tars")
        refuse_folders(whole[0], train_folder, test_folder)
        dataset = with_channels(_load_whole(whole[0], root), decoding.channels, whole[0])
        return _limited(_without_labels(dataset, labels), limit)
    shards = [_find_shards(source, train_folder, test_folder) for source in sources]
    archives = [found for found in shards if found is not None]
    if archives:
        if len(archives) < len(sources):
            others = [source for source, found in zip(sources, shards, strict=True) if found is None]
            raise DataError(f"{printable(others[0])} is no tar archive, as the other data are; expected one kind")
        joined = Shards(*(tuple(path for one in archives for path in one[split]) for split in (0, 1)))
        return _from_shards(joined, limit, bad_images, labels, decoding, progress)
    options = {"labels": labels, "train_folder": train_folder, "test_folder": test_folder}
    found = [find_files(source, data_root=root, **options) for source in sources]
    manifests = [known for files in found if (known := manifest.find(files.path, root)) is not None]
    known = manifest.join_manifests(manifests) if manifests else None
    return _from_files(join(found), limit, bad_images, known, decoding, progress)


def _is_whole(data: str) -> bool:
    """Whether `data` is one array or file of images, already in splits."""
    return data == "shapes" or data in ARRAYS or data.endswith(".beton")


def _load_whole(data: str, root: Path) -> Dataset:
    if data == "shapes":
        return shapes()
    return array_dataset(data, root) if data in ARRAYS else _from_beton(Path(data).expanduser().absolute())


def with_channels(dataset: Dataset, channels: int, name: str) -> Dataset:
    """The images of an array in grey if one channel is asked for. Raises DataError for other channels than 1 and 3."""
    if channels == 3:
        return dataset
    if channels != 1 or dataset.train.pixels is None:
        raise DataError(
            f"{printable(name)} holds red, green and blue, and --channels is {channels}: "
            + ("give the folder of the images" if name.endswith(".beton") else "use --channels 3, or 1 for grey")
        )

    def grey(index: ImageIndex | None) -> ImageIndex | None:
        return None if index is None or index.pixels is None else replace(index, pixels=luma(index.pixels))

    train = grey(dataset.train)
    assert train is not None
    bank = train if dataset.bank is dataset.train else grey(dataset.bank)
    return replace(dataset, train=train, test=grey(dataset.test), bank=bank)


def _without_labels(dataset: Dataset, labels: bool) -> Dataset:
    """The data set itself, or one without labels."""
    if labels:
        return dataset
    train, test = dataset.train.unlabelled(), dataset.test and dataset.test.unlabelled()
    return Dataset(train, test, choices=Choices(labels="--no-labels"))


def _from_beton(path: Path) -> Dataset:
    tests = [path.with_name(f"{name}.beton") for name in TESTS] if path.name == "train.beton" else []
    test = next((candidate for candidate in tests if candidate.exists()), None)
    return Dataset(read_index(str(path)), None if test is None else read_index(str(test)))


def _find_shards(data: str, train_folder: str | None, test_folder: str | None) -> Shards | None:
    """The archives of `data` or of the folders in it that are named, if they are archives."""
    shards = None if data in NAMES else find_shards(data)
    if shards is None or (train_folder, test_folder) == (None, None):
        return shards
    folder = absolute(data)
    if not os.path.isdir(folder):
        refuse_folders(data, train_folder, test_folder)
    parts = []
    for name, guessed in ((train_folder, shards.train), (test_folder, shards.test)):
        found = None if name is None else find_shards(os.path.join(folder, os.path.expanduser(name)))
        if name is not None and found is None:
            raise DataError(f"{printable(name)} is no folder of archives in {printable(folder)}; expected one")
        parts.append(guessed if found is None else found.train)
    return Shards(*parts)


def _from_shards(
    shards: Shards, limit: int | None, bad_images: BadImages, labels: bool, decoding: Decoding, progress: Progress
) -> Dataset:
    members = list_members(shards.train)
    files, class_names = named_classes(shards.train, members.files)
    if not labels:
        files, class_names = replace(files, classes=None, why="--no-labels"), ()
    name = _shards_name(shards.train)
    everything = range(len(files.paths))
    train = _shards_split(name, members, files, class_names, everything, limit, bad_images, decoding, progress)
    if not shards.test:
        return assemble(train, None, Choices(files.why, others=files.others))
    held = list_members(shards.test)
    test_files = named_classes(shards.test, held.files)[0] if labels else replace(held.files, classes=None)
    kept, why = in_common(files, test_files)
    others = Counter(files.others) + Counter(test_files.others)
    if kept is None:
        return assemble(train, None, Choices(files.why, f"not {_shards_name(shards.test)}: {why}", others=others))
    name = _shards_name(shards.test)
    names = class_names if files.classes is not None else test_files.class_names()
    test = _shards_split(name, held, test_files, names, kept, limit, bad_images, decoding, progress)
    return assemble(train, test, Choices(files.why, why, others=others))


def _shards_name(archives: tuple[str, ...]) -> str:
    return os.path.join(os.path.basename(os.path.dirname(archives[0])), os.path.basename(archives[0]))


def _shards_split(
    name: str,
    members: Members,
    files: ImageFiles,
    class_names: tuple[str, ...],
    kept: Sequence[int],
    limit: int | None,
    bad_images: BadImages,
    decoding: Decoding,
    progress: Progress,
) -> Split:
    """The index of the members at the positions `kept`, as far as the limit allows."""
    among = np.asarray(kept, dtype=np.int64)
    labels = files.select(among.tolist()).labels(class_names)
    positions = positions_within(len(among), labels, limit)
    records = members.records.select(among[positions])
    headers = inspect_members(records, decoding, progress)
    selected = None if labels is None else labels[positions]
    index = ImageIndex(name, headers.sizes, selected, class_names, records=records, decoding=decoding)
    span = sampled_span(index, headers.deep)
    return without_bad(index, headers, bad_images, opened=len(positions), span=span)


def _from_files(
    files: DataFiles,
    limit: int | None,
    bad_images: BadImages,
    known: ScanManifest | None,
    decoding: Decoding,
    progress: Progress,
) -> Dataset:
    settings = (limit, bad_images, known, decoding)
    class_names = files.class_names or files.train.class_names()
    train = index_files(files.train, files.train_name, class_names, *settings, progress=progress)
    test = None
    if files.test is not None:
        names = class_names if files.train.classes is not None else files.test.class_names()
        order = files.train.class_names() if files.train.classes is not None else names
        test = index_files(files.test, files.test_name, names, *settings, order, progress)
    opened = train.opened + (0 if test is None else test.opened)
    return assemble(train, test, files.choices, "" if known is None else indexing_text(opened))


def _limited(dataset: Dataset, limit: int | None) -> Dataset:
    """A data set cut to `limit` images per split."""

    def limited(index: ImageIndex | None) -> ImageIndex | None:
        if index is None or limit is None or limit >= len(index):
            return index
        return index.select(limit_positions(len(index), index.labels, limit))

    train = limited(dataset.train)
    assert train is not None
    bank = train if dataset.bank is dataset.train else limited(dataset.bank)
    return replace(dataset, train=train, test=limited(dataset.test), bank=bank)
