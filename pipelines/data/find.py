"""Finds the files of a data set that is stored as files: a folder, a list of paths, or Imagenette."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.data.choices import Choices, merged
from pipelines.data.decode import printable
from pipelines.data.files import ImageFiles, joined
from pipelines.data.layout import in_common, read_layout
from pipelines.data.lists import read_list
from pipelines.data.named import imagenette_folders
from pipelines.data.names import ARRAYS, NAMES
from pipelines.errors import DataError
from pipelines.files import absolute
from pipelines.suggest import closest


def refuse_folders(data: str, train_folder: str | None, test_folder: str | None) -> None:
    for flag, folder in (("--train-folder", train_folder), ("--test-folder", test_folder)):
        if folder is not None:
            raise DataError(f"{flag} names a folder in a folder of images, and {printable(data)} is none: leave it out")


@dataclass(frozen=True, eq=False)
class DataFiles:
    """The files of a data set, before any of them is opened.

    path         the folder or list file, absolute; a manifest belongs to it
    train, test  the files for pretraining, and those for evaluation or None; with their display names
    class_names  display names of the classes, if different from the folder names
    choices      what was taken for what, and why
    """

    path: str
    train: ImageFiles
    train_name: str
    test: ImageFiles | None = None
    test_name: str = ""
    class_names: tuple[str, ...] = ()
    choices: Choices = field(default_factory=Choices)


def find_files(
    data: str,
    *,
    data_root: str | Path,
    labels: bool = True,
    train_folder: str | None = None,
    test_folder: str | None = None,
) -> DataFiles:
    """The files of `data`, as in `load_dataset`. Raises DataError, also if the data set is not stored as files."""
    root = Path(data_root).expanduser()
    if data == "shapes" or data in ARRAYS:
        kind = "drawn in memory" if data == "shapes" else "downloaded as one verified archive"
        raise DataError(f"{data} is {kind} and has no image files; expected a folder, a list of paths, or imagenette")
    if data == "imagenette":
        folder, class_names = imagenette_folders(root)
        return replace(_in_folder(str(folder), data, labels, train_folder, test_folder), class_names=class_names)
    path = absolute(data)
    if data.endswith(".beton"):
        raise DataError(f"{printable(data)} holds records, checked when written; expected the original images")
    if os.path.isdir(path):
        return _in_folder(path, os.path.basename(path) or path, labels, train_folder, test_folder)
    if os.path.isfile(path):
        refuse_folders(data, train_folder, test_folder)
        files = read_list(path)
        files = files if labels else replace(files, classes=None, why="--no-labels")
        return DataFiles(path, files, os.path.basename(path), choices=Choices(files.why))
    suggestion = closest(data.lower(), NAMES, cutoff=0.6)
    hint = f"names are {', '.join(NAMES)}" if suggestion is None else f"did you mean {suggestion}?"
    raise DataError(f"{printable(data)} does not exist; expected a folder, a list of paths or a name: {hint}")


def _in_folder(root: str, name: str, labels: bool, train_folder: str | None, test_folder: str | None) -> DataFiles:
    layout = read_layout(root, labels=labels, train_folder=train_folder, test_folder=test_folder)

    def named(folder: str) -> str:
        below = os.path.relpath(folder, root)
        return name if below == os.curdir else folder if below.startswith(os.pardir) else f"{name}/{below}"

    test_name = "" if layout.test is None else named(layout.test_folder)
    return DataFiles(root, layout.train, named(layout.train_folder), layout.test, test_name, choices=layout.choices)


def join(found: Sequence[DataFiles]) -> DataFiles:
    """All files of several data sets, each once; classes of the same name are one class."""
    if len(found) == 1:
        return found[0]
    more = f" and {len(found) - 1} more"
    tests = [files.test for files in found if files.test is not None]
    train, test, why = joined([files.train for files in found]), joined(tests) if tests else None, ""
    if test is not None:
        kept, why = in_common(train, test)
        test = None if kept is None else test.select(kept)
    names = [files.test_name for files in found if files.test is not None]
    choices = merged([*(files.choices for files in found), Choices(evaluation=why)])
    test_name = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else ""
    return DataFiles(found[0].path, train, found[0].train_name + more, test, test_name, choices=choices)
