"""Tar archives of images as WebDataset lays them out: found, indexed, and never extracted.

An archive is a sequence of samples, files whose names agree up to the first dot after the last slash: `0042.jpg` is an
image and `0042.cls` its label. Where no image has a `.cls`, the folders inside of the archives are the classes, if
every image lies directly in one of at least two that stand side by side. Other files are passed over.

Images are read where they lie, at their offsets, so archives may lie on a slow or a shared disk. Only uncompressed
archives can be: what is compressed has no offsets.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
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

CLASS_NAMES = "classes.txt"  # beside the archives: the name of class 0, of class 1, …, one a line
MAX_LABEL_BYTES = 256
MAX_ARCHIVES = 10**6
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shards(NamedTuple):
    """Archives in order, absolute paths: what pretraining sees, and what is evaluated on, if anything."""

    train: tuple[str, ...]
    test: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Members:
    """N images of some archives, before any of them is looked at.

    files    `paths` is SHARD/MEMBER for messages and order, `classes` what the archives say of each image
    records  where they lie
    """

    files: ImageFiles
    records: PackedRecords


# ---- which archives --------------------------------------------------------------------------------------------------


def find_shards(data: str) -> Shards | None:
    """The archives that `data` stands for, or None where it is something else.

    data  a `.tar`, a pattern such as `train-{000000..000146}.tar`, or a folder of archives. In a folder with `train`
          and `val` (`valid`, `validation`, `test`) in it, or of archives with those words in their names, the others
          are evaluated on.

    Raises DataError where an archive of a pattern is missing, or a folder holds both archives and compressed ones.
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
    parts = {name: _archives(folder) for name, folder in below.items() if os.path.isdir(folder)}
    if parts.get("train"):
        return Shards(parts["train"], next((parts[name] for name in TEST_FOLDERS if parts.get(name)), ()))
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
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar: every one of them has to be there."""
    found = _RANGE.search(pattern)
    if found is None:
        if not os.path.isfile(pattern):
            raise DataError(f"the archive {printable(pattern)} does not exist; expected every one of the pattern")
        return (pattern,)
    first, last = (int(number) for number in found.groups())
    if last < first or last - first >= MAX_ARCHIVES:
        raise DataError(f"{printable(found.group())} names no archives; expected a range such as {{000..146}}")
    width = len(found[1])
    before, after = pattern[: found.start()], pattern[found.end() :]
    return tuple(path for number in range(first, last + 1) for path in _expand(f"{before}{number:0{width}d}{after}"))


def _is_compressed(name: str) -> bool:
    return name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst"))


def _compressed(path: str) -> DataError:
    return DataError(
        f"{printable(path)} is compressed, and images are read where they lie in an archive: unpack it, or repack it "
        f"with `python tools/make_shards.py`"
    )


# ---- what is in them -------------------------------------------------------------------------------------------------


def list_members(archives: Sequence[str]) -> Members:
    """Every image of the archives, in their order. Raises DataError for an archive that is damaged or holds none."""
    with ThreadPoolExecutor(min(MAX_THREADS, len(archives))) as pool:
        found = list(pool.map(_list_archive, archives))
    images = [(file, image) for file, (images, _) in enumerate(found) for image in images]
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
    return Members(ImageFiles(paths, classes, sum(skipped for _, skipped in found)), records)


def read_sizes(records: PackedRecords) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Sizes (N, 2) int32 of all images, and (position, reason) of each bad one, whose size is given as 0×0."""
    sizes, bad = np.zeros((len(records.names), 2), dtype=np.int32), []

    def of_archive(file: int) -> list[tuple[int, str]]:
        reasons, path = [], records.paths[file]
        with open(path, "rb", buffering=0) as archive:
            for i in np.flatnonzero(records.files == file).tolist():
                name = f"{records.names[i]} in {path}"
                try:
                    length = int(records.lengths[i])
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
    """The images of an archive in order, and how many other members there are. Only its headers are read."""
    images: list[tuple[str, tarfile.TarInfo]] = []
    labels: dict[str, str] = {}
    skipped = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            for member in archive:
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
            ends = _ends_with_zeros(path)
    except (OSError, tarfile.TarError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{printable(path)} is no readable tar archive ({printable(reason)}); copy it again") from error
    if not ends:
        raise DataError(f"{printable(path)} lacks the end of a tar archive: it was cut short; copy it again")
    return [_Image(m.name, m.offset_data, m.size, labels.get(key)) for key, m in images], skipped


def _ends_with_zeros(path: str) -> bool:
    """Whether the two empty blocks that end an archive are there."""
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

    Labels that are numbers are counted from 0 where `classes.txt` beside the archives names them. Raises DataError
    where that file and the labels do not fit.
    """
    path = Path(archives[0]).with_name(CLASS_NAMES)
    if files.classes is None or not path.is_file():
        return files.labels(), files.class_names()
    names = tuple(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    number_of = {str(number): number for number in range(len(names))}
    odd = sorted(set(files.classes) - number_of.keys())
    if odd or len(set(names)) != len(names):
        found = f"an image has the label {printable(odd[0])}" if odd else "one name stands there twice"
        raise DataError(f"{printable(str(path))} names {len(names)} classes, and {found}; fix or remove the file")
    return np.array([number_of[name] for name in files.classes], dtype=np.int64), names
