"""Lists the image files below a folder, without opening images.

Files are sorted by the bytes of their relative paths, on every machine. Hidden files and folders and `__MACOSX` are
ignored, what fastmoco wrote is left out (`own_outputs`), and files that are no images are counted (`file_kinds`). With
`arrays` NumPy arrays are the images, and only they.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from pipelines.data.decode import printable
from pipelines.data.file_kinds import ARRAY, EXTENSIONS, are_images, describe_others, extension, may_be_image
from pipelines.data.own_outputs import is_own_picture, kind_of_folder
from pipelines.errors import DataError
from pipelines.reads import Timed


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files, and their classes if the folders or a list define them.

    paths    absolute, in order
    classes  the class name of each file, None for a file without one; None if no file has one
    why      what the classes are taken from, or why there are none
    others   number of files that are no images, by extension
    outputs  (path, kind) of what fastmoco wrote there, which is left out
    """

    paths: tuple[str, ...]
    classes: tuple[str | None, ...] | None = None
    why: str = ""
    others: Mapping[str, int] = field(default_factory=dict)
    outputs: tuple[tuple[str, str], ...] = ()

    def class_names(self) -> tuple[str, ...]:
        """Sorted by their bytes, or as numbers if all of them are numbers."""
        names = {name for name in self.classes or () if name is not None}
        numbers = all(name.isascii() and name.isdigit() for name in names)
        return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, os.fsencode(name))))

    def labels(self, class_names: tuple[str, ...] | None = None) -> np.ndarray | None:
        """(N,) int64 positions in `class_names`, by default those of these files; -1 for a file whose class is none."""
        if self.classes is None:
            return None
        names = self.class_names() if class_names is None else class_names
        number = {name: label for label, name in enumerate(names)}
        return np.array([-1 if name is None else number.get(name, -1) for name in self.classes], dtype=np.int64)

    def select(self, positions: Sequence[int]) -> ImageFiles:
        """The files at these positions, in that order."""
        paths = tuple(self.paths[i] for i in positions)
        classes = None if self.classes is None else tuple(self.classes[i] for i in positions)
        return replace(self, paths=paths, classes=classes)


def joined(parts: Sequence[ImageFiles]) -> ImageFiles:
    """The files of several lists or folders: a file of an earlier one is not repeated."""
    seen: set[str] = set()
    kept: list[ImageFiles] = []
    others: Counter[str] = Counter()
    for part in parts:
        kept.append(part.select([i for i, path in enumerate(part.paths) if path not in seen]))
        seen.update(part.paths)
        others.update(part.others)
    labelled = any(part.classes is not None for part in kept)
    classes = tuple(name for part in kept for name in part.classes or [None] * len(part.paths))
    return ImageFiles(
        tuple(path for part in kept for path in part.paths),
        classes if labelled else None,
        "; ".join(dict.fromkeys(part.why for part in parts if part.why)),
        others,
        tuple(output for part in parts for output in part.outputs),
    )


class Folder(NamedTuple):
    """What is directly in a folder, without hidden entries; paths, those of folders sorted by their bytes.

    output  the kind of folder, if fastmoco wrote it
    """

    identity: tuple[int, int]
    folders: list[str]
    files: list[str]
    output: str | None


def list_folder(root: str, without: Collection[str] = (), *, arrays: bool = False) -> ImageFiles:
    """Every image below `root`, without classes.

    without  folders to leave out

    A folder reached twice, through symbolic links, is listed once, under its real path if that is below `root`.
    Raises DataError if a folder cannot be read or there are no images.
    """
    seen: set[tuple[int, int]] = set()
    paths: list[str] = []
    unknown: list[str] = []
    outputs: list[tuple[str, str]] = []
    others: Counter[str] = Counter()
    folders, links = [root], []  # links are followed after all real folders
    while folders or links:
        path = folders.pop() if folders else links.pop()
        folder = read_folder(path)
        if folder.identity in seen or path in without:
            continue
        seen.add(folder.identity)
        if folder.output is not None:
            outputs.append((path, folder.output))
            continue
        for below in folder.folders:
            (links if os.path.islink(below) else folders).append(below)
        for file in folder.files:
            if arrays:
                if file.lower().endswith(ARRAY):
                    paths.append(file)
                else:
                    others[extension(os.path.basename(file))] += 1
            elif file.lower().endswith(EXTENSIONS):  # as `may_be_image`, in half the time
                if file.endswith(".png") and is_own_picture(file):
                    outputs.append((file, "picture"))
                else:
                    paths.append(file)
            elif may_be_image(name := os.path.basename(file)) is None:
                unknown.append(file)
            else:
                others[extension(name)] += 1
        links.sort(key=os.fsencode, reverse=True)
    for path, found in zip(unknown, are_images(unknown), strict=True):
        if found:
            paths.append(path)
        else:
            others[extension(os.path.basename(path))] += 1
    if not paths:
        raise no_images(root, others, outputs)
    paths.sort(key=_order)
    return ImageFiles(tuple(paths), others=others, outputs=tuple(sorted(outputs)))


def no_images(root: str, others: Mapping[str, int], outputs: Collection[tuple[str, str]] = ()) -> DataError:
    """The error for a folder without images, with what is there instead."""
    there = [describe_others(others)] if others else []
    if outputs:
        there.append(f"{len(outputs):,} output{'s' * (len(outputs) != 1)} of fastmoco")
    return DataError(
        f"{printable(root)} holds no images ({', '.join(there) or 'no files'}); expected files that end in "
        f"{', '.join(EXTENSIONS)} or begin like one of these, in it or below"
    )


def holds_image(root: str, *, arrays: bool = False) -> bool:
    """Whether there is an image below `root`: looks no further than the first. Raises DataError."""
    seen: set[tuple[int, int]] = set()
    folders = [root]
    while folders:
        folder = read_folder(folders.pop())
        if folder.identity in seen or folder.output is not None:
            continue
        seen.add(folder.identity)
        if any_image(folder.files, arrays=arrays):
            return True
        folders += reversed(folder.folders)
    return False


def any_image(files: Collection[str], *, arrays: bool = False) -> bool:
    """Whether one of these files is an image."""
    if arrays:
        return any(file.lower().endswith(ARRAY) for file in files)
    unknown = []
    for file in files:
        name = os.path.basename(file)
        kind = may_be_image(name)
        if kind and not (name.endswith(".png") and is_own_picture(file)):
            return True
        if kind is None:
            unknown.append(file)
    return any(are_images(unknown))


def read_folder(folder: str) -> Folder:
    """What is directly in `folder`. A dangling link counts as a file, bad later. Raises DataError."""
    folders, files, names = [], [], set[str]()
    try:
        with Timed(folder):
            status, entries = os.stat(folder), os.scandir(folder)
        with entries:
            while True:
                with Timed(folder):
                    entry = next(entries, None)
                if entry is None:
                    break
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                with Timed(entry.path):  # the target of a link may be on another disk
                    is_folder, is_file = entry.is_dir(), entry.is_file()
                if is_folder:
                    folders.append(entry.path)
                elif is_file or entry.is_symlink():  # not a pipe, socket or device
                    files.append(entry.path)
                    if entry.name.endswith(".json"):
                        names.add(entry.name)
    except OSError as error:
        raise DataError(
            f"cannot read the folder {printable(folder)} ({error.strerror}); make it readable or leave it out"
        ) from error
    output = kind_of_folder(folder, names, [os.path.basename(path) for path in folders])
    return Folder((status.st_dev, status.st_ino), sorted(folders, key=os.fsencode), files, output)


def _order(path: str, separator: str = os.sep) -> bytes:
    """The key by which files are sorted: a path's bytes on Linux."""
    return os.fsencode(path if separator == "/" else path.replace(separator, "/"))
