"""Tar archives of images in WebDataset layout: listed, indexed, and never extracted.

An archive is a sequence of samples, files whose names agree up to the first dot after the last slash: `0042.jpg` is an
image and `0042.cls` its label. If no image has a `.cls`, the folders inside the archives are the classes, provided that
every image is directly in one of at least two sibling folders. Other files are skipped.

Images are read in place, at their offsets, so archives may be on a slow or a shared disk. This needs uncompressed
archives: compressed members have no offsets.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.data.decode import bad_image, printable
from pipelines.data.files import EXTENSIONS, TEST_FOLDERS, ImageFiles
from pipelines.data.headers import MAX_THREADS, read_part_header
from pipelines.data.index import PackedRecords
from pipelines.errors import DataError
from pipelines.reads import Timed, read_file

CLASS_NAMES = "classes.txt"  # next to the archives: the names of class 0, class 1, …, one per line
MAX_LABEL_BYTES = 256
MAX_ARCHIVES = 10**6
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shards(NamedTuple):
    """Absolute paths of the archives, in order: those for pretraining, and those for evaluation, if any."""

    train: tuple[str, ...]
    test: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Members:
    """N images of some archives, before any of them is read.

    files    `paths` is SHARD/MEMBER for messages and order, `classes` the class of each image
    records  their offsets and lengths
    """

    files: ImageFiles
    records: PackedRecords


# ---- which archives --------------------------------------------------------------------------------------------------


def find_shards(data: str) -> Shards | None:
    """The archives of `data`, or None if it is something else.

    data  a `.tar`, a pattern such as `train-{000000..000146}.tar`, or a folder of archives. A folder may contain
          folders `train` and `val` (`valid`, `validation`, `test`), or archives with those words in their names; then
          the latter are the test split.

    Raises DataError if an archive of a pattern is missing, or a folder contains both plain and compressed archives.
    """
    path = os.path.abspath(os.path.expanduser(data))
    if _RANGE.search(data):
        return Shards(_expand(path))
    if os.path.isfile(path):
        if _is_compressed(path):
            raise _compressed(path)
        return Shards((path,)) if path.endswith(".tar") else None
    if not os.path.isdir(path):
        return None
    below = {name: os.path.join(path, name) for name in ("train", *TEST_FOLDERS)}
    splits = {name: _archives(folder) for name, folder in below.items() if os.path.isdir(folder)}
    if splits.get("train"):
        return Shards(splits["train"], next((splits[name] for name in TEST_FOLDERS if splits.get(name)), ()))
    here = _archives(path)
    if not here:
        return None
    named = {word: tuple(p for p in here if word in os.path.basename(p).lower()) for word in ("train", *TEST_FOLDERS)}
    if not named["train"]:
        return Shards(here)
    return Shards(named["train"], next((named[word] for word in TEST_FOLDERS if named[word]), ()))


def _archives(folder: str) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        names = sorted((entry.name for entry in entries if not entry.name.startswith(".")), key=os.fsencode)
    archives = tuple(os.path.join(folder, name) for name in names if name.endswith(".tar"))
    compressed = [name for name in names if _is_compressed(name)]
    if archives and compressed:
        raise _compressed(os.path.join(folder, compressed[0]))
    return archives


def _expand(pattern: str) -> tuple[str, ...]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar, all of which must exist."""
    match = _RANGE.search(pattern)
    if match is None:
        if not os.path.isfile(pattern):
            raise DataError(f"the archive {printable(pattern)} does not exist; expected every archive of the pattern")
        return (pattern,)
    first, last = (int(number) for number in match.groups())
    if last < first or last - first >= MAX_ARCHIVES:
        raise DataError(f"{printable(match.group())} is not a valid range; expected one such as {{000..146}}")
    width = len(match[1])
    before, after = pattern[: match.start()], pattern[match.end() :]
    return tuple(path for number in range(first, last + 1) for path in _expand(f"{before}{number:0{width}d}{after}"))


def _is_compressed(name: str) -> bool:
    return name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst"))


def _compressed(path: str) -> DataError:
    return DataError(
        f"{printable(path)} is compressed, and images are read in place from archives: decompress it, or repack it "
        f"with `python tools/make_shards.py`"
    )


# ---- their contents --------------------------------------------------------------------------------------------------


def list_members(archives: Sequence[str]) -> Members:
    """Every image of the archives, in their order. Raises DataError for an archive that is damaged or holds none."""
    with ThreadPoolExecutor(min(MAX_THREADS, len(archives))) as pool:
        contents = list(pool.map(_list_archive, archives))
    images = [(file, image) for file, (images, _) in enumerate(contents) for image in images]
    if not images:
        raise DataError(
            f"{printable(archives[0])} {f'and {len(archives) - 1:,} more hold' if len(archives) > 1 else 'holds'} no "
            f"images; expected members that end in {', '.join(EXTENSIONS)}"
        )
    records = PackedRecords(
        tuple(archives),
        np.array([file for file, _ in images], dtype=np.int32),
        np.array([image.offset for _, image in images], dtype=np.int64),
        np.array([image.length for _, image in images], dtype=np.int64),
        np.zeros(len(images), dtype=bool),
        tuple(image.name for _, image in images),
    )
    paths = tuple(f"{archives[file]}/{image.name}" for file, image in images)
    classes = _classes([image for _, image in images], archives)
    return Members(ImageFiles(paths, classes, sum(skipped for _, skipped in contents)), records)


def read_sizes(records: PackedRecords) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Sizes (N, 2) int32 of all images, and (position, reason) of each bad one, whose size is 0×0."""
    sizes, bad = np.zeros((len(records.names), 2), dtype=np.int32), []

    def of_archive(file: int) -> list[tuple[int, str]]:
        reasons, path = [], records.paths[file]
        with open(path, "rb", buffering=0) as archive:
            for i in np.flatnonzero(records.files == file).tolist():
                name = f"{records.names[i]} in {path}"
                try:
                    length = int(records.lengths[i])
                    with Timed(name):
                        sizes[i] = read_part_header(archive.fileno(), int(records.offsets[i]), length, name)
                except OSError as error:
                    reasons.append((i, str(bad_image(name, ValueError(error.strerror or str(error))))))
                except DataError as error:
                    reasons.append((i, str(error)))
        return reasons

    with ThreadPoolExecutor(min(MAX_THREADS, len(records.paths))) as pool:
        for reasons in pool.map(of_archive, range(len(records.paths))):
            bad += reasons
    return sizes, sorted(bad)


class _Image(NamedTuple):
    name: str
    offset: int
    length: int
    label: str | None


def _list_archive(path: str) -> tuple[list[_Image], int]:
    """The images of an archive in order, and the number of other members. Reads headers only."""
    images: list[tuple[str, tarfile.TarInfo]] = []
    labels: dict[str, str] = {}
    skipped = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            for member in _members(archive, path):
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}"
                if not member.isreg() or member.issparse() or name.startswith("."):
                    skipped += not member.isdir()
                elif extension == "cls" and member.size <= MAX_LABEL_BYTES:
                    file = archive.extractfile(member)
                    assert file is not None
                    labels[key] = file.read().decode("utf-8", "surrogateescape").strip()
                elif name.lower().endswith(EXTENSIONS):
                    images.append((key, member))
                else:
                    skipped += 1
            complete = _ends_with_zeros(path)
    except (OSError, tarfile.TarError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{printable(path)} is not a readable tar archive ({printable(reason)}); copy it again"
        ) from error
    if not complete:
        raise DataError(f"{printable(path)} has no end-of-archive marker: it is truncated; copy it again")
    return [_Image(m.name, m.offset_data, m.size, labels.get(key)) for key, m in images], skipped


def _members(archive: tarfile.TarFile, path: str) -> Iterator[tarfile.TarInfo]:
    while True:
        with Timed(path):  # one header at a time: an archive of many images may take longer than a read
            member = archive.next()
        if member is None:
            return
        yield member


def _ends_with_zeros(path: str) -> bool:
    """Whether the file ends with the two zero blocks that end an archive."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 2 * tarfile.BLOCKSIZE))
        return file.read() == bytes(2 * tarfile.BLOCKSIZE)


def _classes(images: Sequence[_Image], archives: Sequence[str]) -> tuple[str, ...] | None:
    labels = [image.label for image in images]
    if all(label is None for label in labels):
        folders = [os.path.dirname(os.path.normpath(f"/{image.name}")) for image in images]
        top = os.path.commonpath(folders)
        folders = [os.path.relpath(folder, top) for folder in folders]
        deep = any(os.sep in folder or folder == os.curdir for folder in folders)
        return None if deep or len(set(folders)) < 2 else tuple(folders)
    for image, label in zip(images, labels, strict=True):
        if not label:
            raise DataError(
                f"{printable(image.name)} has no label in a .cls file, and other images have one; expected one for "
                f"every image, or for none"
            )
    return tuple(label for label in labels if label is not None)


def labels_of(archives: Sequence[str], files: ImageFiles) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """(N,) int64 labels, or None, and the names of the classes.

    With a `classes.txt` next to the archives, labels are line numbers of that file, from 0. Raises DataError if a label
    is not one.
    """
    path = Path(archives[0]).with_name(CLASS_NAMES)
    if files.classes is None or not path.is_file():
        return files.labels(), files.class_names()
    try:
        names = tuple(read_file(str(path)).decode("utf-8", "surrogateescape").splitlines())
    except OSError as error:
        raise DataError(f"cannot read {printable(str(path))} ({error.strerror or error}); fix or remove it") from error
    number_of = {str(number): number for number in range(len(names))}
    odd = sorted(set(files.classes) - number_of.keys())
    if odd or len(set(names)) != len(names):
        problem = f"an image has the label {printable(odd[0])}" if odd else "one name is listed twice"
        raise DataError(f"{printable(str(path))} names {len(names)} classes, and {problem}; fix or remove the file")
    return np.array([number_of[name] for name in files.classes], dtype=np.int64), names
