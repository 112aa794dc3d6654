"""What a user should know about how images are decoded, in one line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from os.path import basename

import numpy as np

from pipelines.data.decode import examine, printable
from pipelines.data.decoding import Decoding
from pipelines.data.file_kinds import ARRAY
from pipelines.data.formats.common import TRUNCATED
from pipelines.data.formats.deep import Span, joined
from pipelines.data.index import Dataset, ImageIndex
from pipelines.errors import DataError

TINY, LONG = 8, 8  # a side in pixels; a ratio of sides
SAMPLED = 16  # images of more than 8 bits whose values are looked at, if there is no scan

Tolerated = Sequence[tuple[str, str]]  # (path, fault)


def decoding_lines(dataset: Dataset) -> list[str]:
    """What was tolerated in a data set, the value range to choose, which axes of arrays are what, and odd sizes."""
    train = dataset.train
    return [*lines_of(dataset.tolerated, dataset.span, train.decoding), *_axes_lines(train), *size_lines(train)]


def lines_of(tolerated: Tolerated, span: Span | None, decoding: Decoding) -> list[str]:
    """What was tolerated, and the value range to choose for these values."""
    line = span_line(span, decoding.value_range)
    return tolerated_lines(tolerated) + ([] if line is None else [line])


def size_lines(index: ImageIndex) -> list[str]:
    """Which images are tiny, or very long, of which crops show next to nothing."""
    shorter, longer = index.sizes.min(axis=1), index.sizes.max(axis=1)
    lines = []
    for odd, what in (
        (shorter < TINY, f"a side of less than {TINY} pixels, which crops enlarge"),
        (
            (longer > LONG * shorter) & (shorter >= TINY),
            f"sides of more than {LONG} to 1, of which a crop shows a part",
        ),
    ):
        found = np.flatnonzero(odd)
        if len(found):
            height, width = index.sizes[found[0]].tolist()
            example = f"{printable(file_name(index, int(found[0])))} is {width}×{height}"
            lines.append(f"{_images(len(found))} {what}: {'e.g. ' if len(found) > 1 else ''}{example}")
    return lines


def _axes_lines(index: ImageIndex) -> list[str]:
    """How the first NumPy array is taken, and so probably all of them."""
    if index.paths is None or not index.paths or not index.paths[0].lower().endswith(ARRAY):
        return []
    try:
        kind = examine(index.stored_bytes(0), index.display_name(0), index.decoding, spans=False).kind
    except DataError:  # reported when it is read for training
        return []
    axes = {"HW": "(height, width)", "HWC": "(height, width, channels)", "CHW": "(channels, height, width)"}
    return [f"arrays are taken as {axes[kind.removeprefix('NPY ').split(';')[0]]}"]


def tolerated_lines(tolerated: Tolerated) -> list[str]:
    """How many images have faults beside their pixels, or are truncated, and which."""
    cut = [(path, fault) for path, fault in tolerated if TRUNCATED in fault]
    beside = [(path, fault) for path, fault in tolerated if TRUNCATED not in fault]
    lines = []
    if beside:
        faults = Counter(fault for _, fault in beside).most_common(3)
        named = ", ".join(f"{fault} ({count:,})" for fault, count in faults)
        lines.append(f"{_images(len(beside))} faults beside the pixels, which are whole: {named}; {_example(beside)}")
    if cut:
        lines.append(
            f"{_images(len(cut))} missing pixels and are used as they are, by --truncated accept; {_example(cut)}"
        )
    return lines


def span_line(span: Span | None, value_range: tuple[float, float] | None) -> str | None:
    """The value range to choose, if images of more than 8 bits use a small part of theirs, or have no white."""
    if span is None or value_range is not None:
        return None
    values = f"{span.least:.10g} to {span.most:.10g}"
    if span.white is None:
        return f"images of more than 8 bits have values of {values} and no white of their own: use {span.flags()}"
    if not span.is_small_part:
        return None
    return (
        f"images of more than 8 bits use a small part of their range, {values} of 0 to {span.white:,}, so they become "
        f"dark or flat: use {span.flags()}"
    )


def sampled_span(index: ImageIndex, positions: Sequence[int]) -> Span | None:
    """The values of up to `SAMPLED` of the images at these positions, evenly spaced."""
    spans = []
    for k in evenly_spaced(len(positions), SAMPLED):
        i = positions[k]
        try:
            span = examine(index.stored_bytes(i), index.display_name(i), index.decoding).span
        except DataError:  # reported when it is read for training
            continue
        if span is not None:
            spans.append(span)
    return joined(spans)


def _images(count: int) -> str:
    return f"{count:,} image{' has' if count == 1 else 's have'}"


def _example(tolerated: Tolerated) -> str:
    return f"e.g. {printable(basename(tolerated[0][0]))}" if len(tolerated) > 1 else printable(tolerated[0][0])


def file_name(index: ImageIndex, i: int) -> str:
    """The name of image i without its folders, or its number in a data set without files."""
    if index.records is not None:
        return basename(index.records.names[i])
    return f"image {i:,}" if index.paths is None else basename(index.paths[i])


def evenly_spaced(count: int, most: int) -> list[int]:
    """Up to `most` of the positions 0 to count - 1, the first and the last among them, in rising order."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()
