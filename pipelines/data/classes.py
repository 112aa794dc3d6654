"""The classes of images, from the folders that they are in or from a table beside them, and the reason for the result.

N images
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence

from pipelines.data.decode import printable
from pipelines.data.lists import LABEL_COLUMNS, TABLES, read_table
from pipelines.errors import DataError

Classes = tuple[str | None, ...]

_MOST_SHOWN = 3


def by_folders(
    paths: Sequence[str], root: str, known: Collection[str] = (), separator: str = os.sep
) -> tuple[Classes | None, str]:
    """(N classes, or None; why) of images below `root`: the first folder below it that an image is in.

    Folders are classes if there are two or more, or if one is a class of `known`, and if at most half of the images are
    beside them, which then have no class.
    """
    parents = [path.rpartition(separator)[0] for path in paths]
    start = len(root.rstrip(separator)) + 1 if root else 0
    class_of = {parent: parent[start:].partition(separator)[0] or None for parent in set(parents)}
    classes = tuple(class_of[parent] for parent in parents)
    counts = Counter(name for name in classes if name is not None)
    stray, name = classes.count(None), printable(os.path.basename(root.rstrip(separator))) or "the archives"
    if len(counts) < 2 and not counts.keys() & set(known):
        if not counts or not stray:
            return None, "all images are in one folder"
        return None, f"all images are in one folder or beside it: {shown(list(counts))}"
    if 2 * stray > len(classes):
        return None, f"{stray:,} of {len(classes):,} images are in {name} itself, not in class folders"
    why = f"the folders in {name}"
    if any(separator in parent[start:] for parent in class_of):
        why = f"the first folders in {name}; images are deeper"
    return classes, why + _without(classes, paths, root)


def by_table(paths: Sequence[str], root: str, folder: str) -> tuple[Classes | None, str]:
    """(N classes, or None; why) of images in `folder`, from a table of `lists.TABLES` in it or above, up to `root`."""
    above, reason = folder, ""
    while True:
        for name in TABLES:
            table = os.path.join(above, name)
            if os.path.isfile(table):
                classes, why = _matched(paths, table, above)
                reason = reason or why
                if classes is not None:
                    return classes, f"labels in {name}" + _without(classes, paths, folder)
        if above == root or len(above) <= len(root):
            return None, reason
        above = os.path.dirname(above)


def _matched(paths: Sequence[str], table: str, folder: str) -> tuple[Classes | None, str]:
    """The class that the table states for each image, by its path from the table's folder or by its name alone.

    None and the reason if it states none.
    """
    name = os.path.basename(table)
    try:
        stated = read_table(table)
    except DataError as error:  # labels are not worth an error
        return None, str(error) if str(error).startswith(name) else f"{name} is not read: {error}"
    if not stated:
        return None, f"{name} states no classes, for want of a column such as {', '.join(LABEL_COLUMNS[:3])}"
    classes = [stated.get(os.path.relpath(path, folder)) for path in paths]
    if not any(classes):
        classes = [stated.get(os.path.basename(path)) for path in paths]
    return (tuple(classes), "") if any(classes) else (None, f"{name} names none of the images")


def _without(classes: Classes, paths: Sequence[str], root: str) -> str:
    """The images that have no class, as the end of a sentence."""
    stray = [i for i, name in enumerate(classes) if name is None]
    if not stray:
        return ""
    first = printable(paths[stray[0]][len(root) :].lstrip(os.sep))
    return f"; {len(stray):,} of {len(classes):,} images {'has' if len(stray) == 1 else 'have'} none: {first}" + (
        ", ..." if len(stray) > 1 else ""
    )


def shown(names: Sequence[str]) -> str:
    """`a, b, c, ...`."""
    return ", ".join(printable(name) for name in names[:_MOST_SHOWN]) + (", ..." if len(names) > _MOST_SHOWN else "")
