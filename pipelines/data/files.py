"""Lists image files and their classes, from folders, class folders and list files, without opening images.

Files are sorted by the bytes of their relative paths, on every machine. Hidden files and folders and `__MACOSX` are
ignored; other files without an image extension are counted and skipped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from pipelines.data.decode import printable
from pipelines.errors import DataError
from pipelines.reads import Timed, check_length, open_regular

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
TEST_FOLDERS = ("val", "valid", "validation", "test")  # the first that exists next to `train` is the test split

_LIST_PROBE_BYTES = 4096
_MAX_LIST_BYTES = 2**30  # ten million paths of a hundred letters


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files, and their classes if the folders or the list define them.

    paths    absolute, in order
    classes  the class name of each file, or None without classes
    skipped  number of other files
    """

    paths: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    skipped: int = 0

    def class_names(self) -> tuple[str, ...]:
        """Sorted by their bytes, or as numbers if all of them are numbers."""
        names = set(self.classes or ())
        numbers = all(name.isascii() and name.isdigit() for name in names)
        return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, os.fsencode(name))))

    def labels(self) -> np.ndarray | None:
        """(N,) int64 positions in `class_names`."""
        if self.classes is None:
            return None
        number = {name: label for label, name in enumerate(self.class_names())}
        return np.array([number[name] for name in self.classes], dtype=np.int64)


def find_splits(root: str) -> tuple[str, str | None]:
    """(training folder, test folder or None) of `root`: its `train` and `val` (`valid`, `validation`, `test`).

    They are splits if `train` exists with at least one of the others, or is the only folder; otherwise `root` itself is
    the training folder, so that a class may be called `train`.
    """
    _, folders, _ = _entries(root)
    names = {os.path.basename(folder).lower(): folder for folder in folders}
    tests = [names[name] for name in TEST_FOLDERS if name in names]
    if "train" in names and (tests or len(names) == 1):
        return names["train"], tests[0] if tests else None
    return root, None


def list_folder(root: str) -> ImageFiles:
    """Every image below `root`, with its class if the folders are classes.

    Folders are classes if no image is directly in `root`, every image is directly in one of its sub-folders, and there
    are at least two of those; then each of them must contain an image. In any other layout images have no labels.

    A folder reached twice, through symbolic links, is listed once, under its real path if that is below `root`.
    Raises DataError if a folder cannot be read or there are no images.
    """
    seen, paths, skipped = set(), [], 0
    folders, links = [root], []  # links are followed after all real folders
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        identity, below, files = _entries(folder)
        if identity in seen:
            continue
        seen.add(identity)
        for path in below:
            (links if os.path.islink(path) else folders).append(path)
        images = [path for path in files if path.lower().endswith(EXTENSIONS)]
        paths += images
        skipped += len(files) - len(images)
        links.sort(key=os.fsencode, reverse=True)
    if not paths:
        raise DataError(
            f"{printable(root)} holds no images ({_count(skipped, 'other file')}); expected files that end in "
            f"{', '.join(EXTENSIONS)}, in it or below"
        )
    paths.sort(key=_order)
    return ImageFiles(tuple(paths), _classes(root, paths), skipped)


def read_list(path: str) -> ImageFiles:
    """The images of a list file: one path per line, relative to the file's folder, optionally with `<TAB>class`.

    Either every line has a class or none has. Keeps order and repetitions. Raises DataError with the line number.
    """
    text = _text(path)
    folder = os.path.dirname(os.path.abspath(path))
    paths, classes = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        image, tab, label = line.rstrip("\r").partition("\t")
        if not image:
            continue
        if not image.lower().endswith(EXTENSIONS) or "\0" in line:
            raise DataError(
                f"line {number} of {printable(path)} is '{printable(image[:80])}'; expected the path of an image "
                f"({', '.join(EXTENSIONS)}), then nothing, or a tab and a class"
            )
        paths.append(os.path.join(folder, image))
        classes.append(label.strip() if tab else None)
        if classes[-1] == "" or (classes[0] is None) != (classes[-1] is None):
            has = (
                "no class, unlike the first" if not tab else "a class, unlike the first" if label else "an empty class"
            )
            raise DataError(f"line {number} of {printable(path)} has {has}; give a class on every line or on none")
    if not paths:
        raise DataError(f"{printable(path)} names no images; expected one path per line")
    labelled = tuple(name for name in classes if name is not None)
    return ImageFiles(tuple(paths), labelled or None)


def _text(path: str) -> str:
    """The content of a list file. Raises DataError if it cannot be read or is no text."""
    expected = "expected text with one image path per line"
    try:
        with Timed(path):
            descriptor, status = open_regular(path)
        with open(descriptor, "rb") as file, Timed(path):
            if b"\0" in file.read(_LIST_PROBE_BYTES):
                raise DataError(f"{printable(path)} is neither a folder nor a list; {expected}")
            check_length(status.st_size, _MAX_LIST_BYTES)
            file.seek(0)
            return file.read(status.st_size).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read {printable(path)} ({error.strerror or error}); {expected}") from error


def _entries(folder: str) -> tuple[tuple[int, int], list[str], list[str]]:
    """(identity, folders, files) of `folder` without hidden ones. A dangling link counts as a file, bad later."""
    folders, files = [], []
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
    except OSError as error:
        raise DataError(
            f"cannot read the folder {printable(folder)} ({error.strerror}); make it readable or leave it out"
        ) from error
    return (status.st_dev, status.st_ino), sorted(folders, key=os.fsencode), files


def _order(path: str, separator: str = os.sep) -> bytes:
    """The key by which files are sorted: a path's bytes on Linux."""
    return os.fsencode(path if separator == "/" else path.replace(separator, "/"))


def _classes(root: str, images: list[str]) -> tuple[str, ...] | None:
    """The first-level folder of each image, if those are classes by the rule of `list_folder`."""
    parents = [os.path.dirname(image) for image in images]
    name_of = {parent: os.path.relpath(parent, root) for parent in set(parents)}
    if len(name_of) < 2 or any(os.sep in name or name == os.curdir for name in name_of.values()):
        return None
    names = set(name_of.values())
    folders = [os.path.basename(path) for path in _entries(root)[1] if not os.path.islink(path)]
    empty = [name for name in folders if name not in names]
    if empty:
        raise DataError(
            f"the class folder {printable(os.path.join(root, empty[0]))} holds no images "
            f"({len(empty)} of {len(folders)} class folders are empty); fill or remove it"
        )
    return tuple(name_of[parent] for parent in parents)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
