"""The classes of images in tar archives.

Labels are those in `.cls` files. If no image has one, the folders inside the archives are the classes, as in a folder
of images (`classes.by_folders`). A `classes.txt` next to the archives names them.

N images
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.data.classes import Classes, by_folders
from pipelines.data.decode import printable
from pipelines.data.files import ImageFiles
from pipelines.reads import read_file

CLASS_NAMES = "classes.txt"  # the names of class 0, class 1, …, one per line


def classes_of(images: Sequence[tuple[str, str | None]]) -> tuple[Classes | None, str]:
    """The class of each image (name, label in its `.cls`), and what they are taken from, or why there are none."""
    labels = tuple(label for _, label in images)
    without = sum(label is None for label in labels)
    if without < len(labels):
        some = f"; {without:,} of {len(labels):,} images have none" if without else ""
        return labels, f"labels in .cls files{some}"
    names = [posixpath.normpath(f"/{name}") for name, _ in images]
    return by_folders(names, posixpath.commonpath([posixpath.dirname(name) for name in names]), separator="/")


def named_classes(archives: Sequence[str], files: ImageFiles) -> tuple[ImageFiles, tuple[str, ...]]:
    """The files with the classes that a `classes.txt` next to the archives names, and the names of all classes.

    Labels are then line numbers of that file, from 0. If some are not, or if it cannot be read, it is not used.
    """
    path = Path(archives[0]).with_name(CLASS_NAMES)
    if files.classes is None or not path.is_file():
        return files, files.class_names()
    try:
        names = tuple(read_file(str(path)).decode("utf-8", "surrogateescape").splitlines())
        problem = "" if len(set(names)) == len(names) else "one name is listed twice"
    except OSError as error:
        names, problem = (), f"{error.strerror or error}"
    name_of = {str(number): name for number, name in enumerate(names)}
    odd = sorted({label for label in files.classes if label is not None and label not in name_of})
    if problem or odd:
        problem = problem or f"it names {len(names):,} classes, and there is a label {printable(odd[0])}"
        return replace(files, why=f"{files.why}; {CLASS_NAMES} is not used: {problem}"), files.class_names()
    classes = tuple(None if label is None else name_of[label] for label in files.classes)
    return replace(files, classes=classes), names


def labels_of(archives: Sequence[str], files: ImageFiles) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """(N,) int64 labels, -1 for an image without one, or None; and the names of the classes, by `named_classes`."""
    named, names = named_classes(archives, files)
    return named.labels(names), names
