"""From the files or records of the splits of a data set to its indexes, without bad images and within a limit.

N images
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from pipelines.data.choices import Choices
from pipelines.data.decode import printable
from pipelines.data.decoding import Decoding
from pipelines.data.files import ImageFiles
from pipelines.data.formats.bands import counted_bands
from pipelines.data.formats.deep import Span
from pipelines.data.headers import Headers, Progress, inspect_headers
from pipelines.data.index import Dataset, ImageIndex
from pipelines.data.manifest import ScanManifest
from pipelines.data.notes import file_name, sampled_span
from pipelines.errors import DataError

BadImages = Literal["error", "quarantine"]
MAX_BAD_FRACTION = 0.1  # above this it is not a few bad files but the wrong folder, or a broken disk


class Split(NamedTuple):
    """One split of a data set.

    images     those that are good; the label of one without a class is -1
    left_out   (path, reason) of bad ones
    opened     number of files opened
    tolerated  (path, fault) of images with faults, and `span` the values of those of more than 8 bits, as in `Dataset`
    """

    images: ImageIndex
    left_out: tuple[tuple[str, str], ...]
    opened: int
    tolerated: tuple[tuple[str, str], ...]
    span: Span | None


def index_files(
    files: ImageFiles,
    name: str,
    class_names: tuple[str, ...],
    limit: int | None,
    bad_images: BadImages,
    known: ScanManifest | None,
    decoding: Decoding,
    order: tuple[str, ...] | None = None,
    progress: Progress = lambda done, total: None,
) -> Split:
    """The index of these files. Opens only files within `limit` that changed since the scan or were not scanned.

    class_names  to show
    order        the classes with the labels 0, 1, ... (None: those of the files)
    progress     as of `inspect_headers`
    """
    labels = files.labels(order)
    positions = positions_within(len(files.paths), labels, limit)
    paths = [files.paths[i] for i in positions]
    if known is None:
        headers, opened, scanned = inspect_headers(paths, decoding, progress), len(paths), None
    else:
        headers, opened, scanned = known.headers(paths, decoding, progress)
    selected = None if labels is None else labels[positions]
    names = () if labels is None else class_names
    index = ImageIndex(name, headers.sizes, selected, names, paths=tuple(paths), scanned=scanned, decoding=decoding)
    span = sampled_span(index, headers.deep) if known is None or decoding != known.decoding else known.span()
    return without_bad(index, headers, bad_images, opened=opened, span=span)


def without_bad(index: ImageIndex, headers: Headers, bad_images: BadImages, *, opened: int, span: Span | None) -> Split:
    """The index without its bad images. Raises DataError if more are bad than allowed."""
    bad = headers.bad
    if headers.bands and (bad_images == "error" or len(bad) > MAX_BAD_FRACTION * len(index)):
        raise DataError(_other_bands(index, headers))
    tolerated = tuple((index.path(i), fault) for i, fault in headers.tolerated)
    allowed = MAX_BAD_FRACTION * len(index) if bad_images == "quarantine" else 0
    if len(bad) > allowed:
        remedy = (
            f"at most {MAX_BAD_FRACTION:.0%} may be left out"
            if bad_images == "quarantine"
            else "fix or remove them, or ask for bad images to be quarantined"
        )
        raise DataError(
            f"{len(bad):,} of {len(index):,} images of {printable(index.name)} are bad; {remedy}. {bad[0][1]}"
        )
    if not bad:
        return Split(index, (), opened, tolerated, span)
    good = np.delete(np.arange(len(index)), [i for i, _ in bad])
    left_out = tuple((index.path(i), reason) for i, reason in bad)
    return Split(index.select(good), left_out, opened, tolerated, span)


def _other_bands(index: ImageIndex, headers: Headers) -> str:
    """That images have other bands than the channels that were asked for: how many have how many, and which."""
    examples = dict[int, tuple[int, int]]()  # number of images and the first of them, by bands
    for i, found in headers.bands:
        count, first = examples.get(found, (0, i))
        examples[found] = count + 1, first
    fitting = np.setdiff1d(np.arange(len(index)), [i for i, _ in headers.bad])
    channels, name = index.channels, printable(index.name)
    if not len(fitting) and len(examples) == 1:
        (found,) = examples
        bands = counted_bands(found)
        return f"the images of {name} have {bands}, and --channels is {channels}: give --channels {found}"
    if len(fitting):
        examples[channels] = len(fitting), int(fitting[0])
    counts = sorted(examples.items(), key=lambda item: -item[1][0])
    shown = ", ".join(
        f"{count:,} {'has' if count == 1 else 'have'} {counted_bands(bands)} ({printable(file_name(index, i))})"
        for bands, (count, i) in counts
    )
    return (
        f"the images of {name} have different numbers of bands: {shown}; keep those of one number, with --channels "
        f"{counts[0][0]} for the most"
    )


def indexing_text(opened: int) -> str:
    """Text that describes the source of the image sizes."""
    if opened == 0:
        return "as scanned"
    return f"as scanned, but for {opened:,} new or changed {'file' if opened == 1 else 'files'}"


def positions_within(count: int, labels: np.ndarray | None, limit: int | None) -> np.ndarray:
    """`limit_positions` of labels of which some may be -1: then evenly over all images."""
    return limit_positions(count, None if labels is None or (labels < 0).any() else labels, limit)


def within(files: ImageFiles, limit: int | None) -> ImageFiles:
    """The files that a limit keeps."""
    return files if limit is None else files.select(positions_within(len(files.paths), files.labels(), limit).tolist())


def limit_positions(count: int, labels: np.ndarray | None, limit: int | None) -> np.ndarray:
    """Positions of the images that a limit keeps, in order: (min(count, limit),) int64.

    With labels, the first of every class, then the second of every class, and so on until `limit` are chosen; without
    labels, evenly spaced ones, so those of a smaller limit need not be among those of a larger one.
    """
    if limit is None or limit >= count:
        return np.arange(count)
    if labels is None:
        return np.arange(limit) * count // limit
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    rank = np.empty(count, dtype=np.int64)  # 0 for the first image of its class, 1 for the second
    rank[by_class] = np.arange(count) - starts
    return np.sort(np.lexsort((labels, rank))[:limit])


def assemble(train: Split, test: Split | None, choices: Choices, indexing: str = "") -> Dataset:
    images, bank = train.images, None
    if images.labels is not None and (images.labels < 0).any():
        labelled = np.flatnonzero(images.labels >= 0)
        bank = images.select(labelled) if len(labelled) else None
        images = images.unlabelled(len(labelled))
    held = None if test is None else test.images
    if held is not None and held.labels is not None and (held.labels < 0).any():
        held = held.unlabelled()
    splits = [train] if test is None else [train, test]
    return Dataset(
        images,
        held,
        bank,
        quarantine=tuple(entry for split in splits for entry in split.left_out),
        choices=choices,
        indexing=indexing,
        tolerated=tuple(entry for split in splits for entry in split.tolerated),
        span=train.span,
    )
