"""What the folders of a data set mean: which images are trained on, which evaluate, and which folders are classes.

These are guesses from the names and the depth of folders. `choices.Choices` says what was guessed and why, and
`train_folder`, `test_folder` and `labels` of the caller replace the guesses. Labels are not needed to pretrain, so
nothing about them is an error.

splits       a folder named like `train` (TRAIN) beside one named like `val` or `test` (TESTS, the first that holds
             images), also with words such as `images` or a year: `training`, `train_images`, `val2017`
classes      the first folders below the training folder (`classes.by_folders`), or a table beside the images
wrapper      a folder that is the only one with images is entered
annotations  a folder named like `masks` (ANNOTATIONS) beside one named like `images` (PICTURES) is no data
arrays       in a folder without images of another kind, NumPy arrays are the images
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipelines.data.choices import Choices
from pipelines.data.classes import by_folders, by_table, shown
from pipelines.data.decode import printable
from pipelines.data.files import ImageFiles, any_image, holds_image, list_folder, read_folder
from pipelines.errors import DataError

TRAIN = ("train", "training", "trainset", "trainval", "trn")
TESTS = ("val", "valid", "validation", "valset", "dev", "eval", "evaluation", "test", "testing", "testset", "tst")
_ANNOTATIONS = """
    mask masks annotation annotations annot annots label labels segmentation segmentations segmentationclass
    segmentationobject segmentationclassaug segmentationclassraw depth depths disparity gt groundtruth gtfine
    gtcoarse trimap trimaps semantic instance instances edges normals flow heatmap heatmaps saliency
"""
_PICTURES = "image images img imgs jpegimages rgb leftimg8bit photo photos picture pictures frames"
ANNOTATIONS, PICTURES = frozenset(_ANNOTATIONS.split()), frozenset(_PICTURES.split())

_FILLERS = PICTURES | {"set", "data", "dataset", "split", "ilsvrc", "coco"}


@dataclass(frozen=True, eq=False)
class Layout:
    """The files of a folder: those to train on, in the folder `train_folder`, and those to evaluate on, if any."""

    train: ImageFiles
    train_folder: str
    test: ImageFiles | None
    test_folder: str
    choices: Choices


def read_layout(
    root: str, *, labels: bool = True, train_folder: str | None = None, test_folder: str | None = None
) -> Layout:
    """The images below `root`, an absolute path.

    labels                     False: the folders are no classes
    train_folder, test_folder  folders instead of the guessed ones; absolute, or relative to `root`

    Raises DataError if there are no images to train on, or if a folder that is named does not exist.
    """
    arrays = not holds_image(root) and holds_image(root, arrays=True)
    chosen_test = None if test_folder is None else _named(root, test_folder, "--test-folder")
    if train_folder is not None:
        node = _Node(root, {}, [])
        train_path = _named(root, train_folder, "--train-folder")
        tests = [path for path in find_splits(read_folder(root).folders)[1] if not _overlap(path, train_path)]
    else:
        node = _enter(root, arrays, stop_at_splits=True)
        train_path, tests = find_splits(node.folders)
        if train_path is None or not tests:
            train_path, tests = None, []
    not_used = list(node.annotations.items())
    if train_path is not None and train_folder is None:
        others = [path for path in node.folders if path not in (train_path, *tests[:1], *node.annotations)]
        beside = f"beside {os.path.basename(train_path)}"
        not_used += [(path, beside) for path in others if holds_image(path, arrays=arrays)]
    without = [chosen_test] if chosen_test is not None else []
    train, train_path, more = _split(train_path or node.path, labels, arrays, without=without)
    test, test_path, why = _evaluation(train, tests if chosen_test is None else [chosen_test], labels, arrays)
    if chosen_test is not None:
        why = "; ".join(filter(None, ("--test-folder", why)))
    outputs = train.outputs + (test.outputs if test is not None else ())
    not_used = [(os.path.relpath(path, root), reason) for path, reason in (*not_used, *more) if path != test_path]
    choices = Choices(
        labels=train.why,
        evaluation=why,
        not_used=(*not_used, *_summary(outputs, root)),
        others=Counter(train.others) + Counter(test.others if test is not None else {}),
    )
    return Layout(train, train_path, test, test_path, choices)


def in_common(train: ImageFiles, test: ImageFiles) -> tuple[Sequence[int] | None, str]:
    """Positions of the images of `test` that evaluate, and why not all do.

    Those of a class of `train`, or all if one of them has no classes; None if no class is in common.
    """
    everything = range(len(test.paths))
    if train.classes is None:
        return everything, ""
    if test.classes is None:
        return everything, f"the test split has no labels: {test.why}"
    known, named = set(train.classes), {name for name in test.classes if name is not None}
    kept = [i for i, name in enumerate(test.classes) if name is not None and name in known]
    if len(kept) == len(everything):
        return everything, ""
    if not kept:
        return None, f"none of its {len(named):,} classes is trained on"
    odd = sorted(named - known, key=os.fsencode)
    count = len(everything) - len(kept)
    reason = f"{count:,} image{'s are' if count > 1 else ' is'} left out, "
    return kept, reason + (f"of classes that are not trained on: {shown(odd)}" if odd else "which have no class")


# ---- splits ----------------------------------------------------------------------------------------------------------


def find_splits(folders: Sequence[str]) -> tuple[str | None, list[str]]:
    """(training folder, test folders in order of preference) among these, by their names."""
    words = {path: _word(path) for path in folders}

    def named(word: str) -> list[str]:  # the plain name first
        return sorted((path for path in folders if words[path] == word), key=lambda path: (len(path), path))

    train = [path for word in TRAIN for path in named(word)]
    return (train[0] if train else None), [path for word in TESTS for path in named(word)]


def _word(folder: str) -> str:
    """The word that a folder is named by, without those that say nothing: `val2017` and `val_images` → `val`."""
    words = [word for word in re.findall("[a-z]+", os.path.basename(folder).lower()) if word not in _FILLERS]
    return words[0] if len(words) == 1 else ""


def _named(root: str, folder: str, flag: str) -> str:
    path = os.path.abspath(os.path.join(root, os.path.expanduser(folder)))
    if not os.path.isdir(path):
        raise DataError(f"{flag} {printable(folder)} is no folder in {printable(root)}; expected the name of one")
    return path


def _overlap(a: str, b: str) -> bool:
    a, b = os.path.join(a, ""), os.path.join(b, "")
    return a.startswith(b) or b.startswith(a)


def _evaluation(train: ImageFiles, tests: list[str], labels: bool, arrays: bool) -> tuple[ImageFiles | None, str, str]:
    """(images, folder, why) of the first of these folders that holds images."""
    path = next((path for path in tests if holds_image(path, arrays=arrays)), None)
    if path is None:
        return None, "", f"{shown([os.path.basename(p) for p in tests])} holds no images" if tests else ""
    known = frozenset(name for name in train.classes or () if name is not None)
    test, folder, _ = _split(path, labels, arrays, known=known)
    kept, why = in_common(train, test)
    if kept is None:
        return None, folder, f"not {os.path.basename(path)}: {why}"
    return test if len(kept) == len(test.paths) else test.select(kept), folder, why


# ---- one folder ------------------------------------------------------------------------------------------------------


class _Node(NamedTuple):
    """A folder, the annotation folders in it or above it with the reason, and the other folders in it."""

    path: str
    annotations: dict[str, str]
    folders: list[str]


def _enter(root: str, arrays: bool, *, stop_at_splits: bool = False, known: Collection[str] = ()) -> _Node:
    """`root`, or the only folder with images in it, and so on.

    known  names of classes, which are not entered
    """
    path, annotations, folders = root, dict[str, str](), list[str]()
    for _ in range(64):  # links may lead in circles
        here = read_folder(path)
        found = _annotations(here.folders)
        annotations |= {folder: why for folder, why in found.items() if holds_image(folder, arrays=arrays)}
        folders = [folder for folder in here.folders if folder not in found]
        train, tests = find_splits(folders)
        if any_image(here.files, arrays=arrays) or (stop_at_splits and train is not None and tests):
            break
        content: list[str] = []
        for folder in folders:
            if len(content) < 2 and holds_image(folder, arrays=arrays):
                content.append(folder)
        if len(content) != 1 or os.path.basename(content[0]) in known:
            break
        path = content[0]
    return _Node(path, annotations, folders)


def _annotations(folders: list[str]) -> dict[str, str]:
    """The folders that are annotations of the images in another, with the reason."""
    words = {path: re.sub("[^a-z0-9]", "", os.path.basename(path).lower()) for path in folders}
    pictures = [os.path.basename(path) for path in folders if words[path] in PICTURES]
    if not pictures:
        return {}
    return {path: f"annotations of {pictures[0]}" for path in folders if words[path] in ANNOTATIONS}


def _split(
    root: str, labels: bool, arrays: bool, *, without: Collection[str] = (), known: Collection[str] = ()
) -> tuple[ImageFiles, str, list[tuple[str, str]]]:
    """(files with classes, the folder that they are in, annotation folders not used) of one split.

    known  the classes of the training images, if this is the test split
    """
    node = _enter(root, arrays, known=known)
    files = list_folder(node.path, {*without, *node.annotations}, arrays=arrays)
    if not labels:
        return replace(files, why="--no-labels"), node.path, list(node.annotations.items())
    classes, why = by_table(files.paths, root, node.path)
    if classes is None:
        table = why
        classes, why = by_folders(files.paths, node.path, known)
        why = "; ".join(filter(None, (why, table)))
    return replace(files, classes=classes, why=why), node.path, list(node.annotations.items())


def _summary(outputs: Collection[tuple[str, str]], root: str) -> list[tuple[str, str]]:
    """One line about what fastmoco wrote among the images."""
    if not outputs:
        return []
    where = os.path.relpath(os.path.commonpath([path for path, _ in outputs]), root)
    counts = Counter(kind for _, kind in outputs)
    kinds = [f"{count:,} {kind}{'s' * (count != 1)}" for kind, count in counts.items()]
    return [(where, f"{', '.join(kinds)} of fastmoco")]
