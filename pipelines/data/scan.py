"""Scans a data set: reads and decodes every file once, and records its format, statistics and defects.

N files · H, W height and width of an upright image
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines import reads
from pipelines.data.decode import bad_image, examine, printable
from pipelines.data.decoding import DEFAULT, Decoding
from pipelines.data.formats.bands import BandsError
from pipelines.data.formats.deep import NoWhiteError, Span
from pipelines.data.manifest import ScanManifest
from pipelines.errors import DataError
from pipelines.platforms import clean_context
from pipelines.reads import Timed, check_length, open_regular, read_up_to
from pipelines.workers import StuckRead, start_worker

FILES_PER_TASK = 64  # at least a few milliseconds of work, against 0.2 ms of overhead
DIGEST_BYTES = 16

Advance = Callable[[int, int], None]  # files and bad files since the last call


class _FileScan(NamedTuple):
    """The result for one file. An image has a kind and a histogram (C, 256), a bad file a reason instead.

    tolerated  faults as in `decode.Decoded`
    span       the values of more than 8 bits, also of a file that is bad because they have no white
    bands      those of a file that is bad because they are not the channels that were asked for, else 0
    """

    stat: tuple[int, int]
    digest: bytes
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    histogram: np.ndarray | None = None
    reason: str = ""
    tolerated: str = ""
    span: Span | None = None
    bands: int = 0


class _TaskScan(NamedTuple):
    """The result of a task: columns as in `ScanManifest`, kinds by name, and the sum of its images' histograms."""

    stats: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    kinds: list[str]
    histogram: np.ndarray
    bad: list[tuple[int, str]]
    tolerated: list[tuple[int, str]]
    spans: list[tuple[int, Span]]
    bands: list[tuple[int, int]]


def scan(
    train: Sequence[str],
    others: Sequence[str],
    workers: int,
    advance: Advance = lambda files, bad: None,
    decoding: Decoding = DEFAULT,
) -> ScanManifest:
    """Reads and decodes every file once.

    train, others  absolute paths; only pixels of `train` are counted in the histogram
    workers        processes, or 0 to work in this one. (Threads decode as fast on two cores above 100 pixels; at 32
                   pixels processes are a quarter faster, and with more cores threads wait for the interpreter lock.)
    advance        called with progress
    decoding       how encoded images become pixels; part of the manifest

    The result does not depend on the number of workers. Raises DataError if a process dies.
    """
    paths = (*train, *others)
    tasks = [*_cut(train), *_cut(others)]
    results: list[_TaskScan] = []
    for result in _run(tasks, workers, decoding):
        results.append(result)
        advance(len(result.kinds), len(result.bad))
    kind_names = tuple(sorted({"", *(kind for result in results for kind in result.kinds)}))
    number = {name: i for i, name in enumerate(kind_names)}
    assert len(number) <= 256, "more kinds than uint8 can number"
    starts = np.cumsum([0, *(len(task) for task in tasks)]).tolist()
    train_tasks = sum(1 for start in starts[:-1] if start < len(train))
    return ScanManifest(
        paths=paths,
        stats=np.concatenate([result.stats for result in results]),
        sizes=np.concatenate([result.sizes for result in results]),
        kinds=np.array([number[kind] for result in results for kind in result.kinds], dtype=np.uint8),
        kind_names=kind_names,
        digests=np.concatenate([result.digests for result in results]),
        training=np.arange(len(paths)) < len(train),
        histogram=np.stack([result.histogram for result in results[:train_tasks]]).sum(axis=0),
        bad=tuple((start + i, reason) for start, task in zip(starts, results, strict=False) for i, reason in task.bad),
        tolerated=tuple(
            (start + i, f) for start, task in zip(starts, results, strict=False) for i, f in task.tolerated
        ),
        spans=tuple((start + i, span) for start, task in zip(starts, results, strict=False) for i, span in task.spans),
        bands=tuple((start + i, n) for start, task in zip(starts, results, strict=False) for i, n in task.bands),
        decoding=decoding,
    )


def _cut(paths: Sequence[str]) -> list[Sequence[str]]:
    return [paths[start : start + FILES_PER_TASK] for start in range(0, len(paths), FILES_PER_TASK)]


def _run(tasks: list[Sequence[str]], workers: int, decoding: Decoding) -> Iterator[_TaskScan]:
    """The results of all tasks, in order."""
    if workers == 0:
        yield from (_scan_task(task, decoding) for task in tasks)
        return
    context = clean_context(["pipelines.data.scan"])
    stuck = StuckRead()
    start = partial(start_worker, stuck=stuck, limit_s=reads.LIMIT_S)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=start, initargs=(0,))
    done = 0
    try:
        for result in pool.map(partial(_scan_task, decoding=decoding), tasks):
            yield result
            done += 1
    except BrokenProcessPool as error:
        if line := stuck.line():
            raise DataError(line) from error
        first = printable(tasks[done][0])
        raise DataError(
            f"a process that reads images died, at {first} or soon after: check whether memory ran out, or find the "
            f"file that crashes it with --workers 0"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _scan_task(paths: Sequence[str], decoding: Decoding) -> _TaskScan:
    files = [_scan_file(path, decoding) for path in paths]
    histograms = [file.histogram for file in files if file.histogram is not None]
    return _TaskScan(
        stats=np.array([file.stat for file in files], dtype=np.int64),
        sizes=np.array([file.size for file in files], dtype=np.int32),
        digests=np.frombuffer(b"".join(file.digest for file in files), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        kinds=[file.kind for file in files],
        histogram=np.stack([np.zeros((decoding.channels, 256), dtype=np.int64), *histograms]).sum(axis=0),
        bad=[(i, file.reason) for i, file in enumerate(files) if file.reason],
        tolerated=[(i, file.tolerated) for i, file in enumerate(files) if file.tolerated],
        spans=[(i, file.span) for i, file in enumerate(files) if file.span is not None],
        bands=[(i, file.bands) for i, file in enumerate(files) if file.bands],
    )


def _scan_file(path: str, decoding: Decoding) -> _FileScan:
    """Never raises: any defect of the file becomes its reason."""
    stat, digest = (-1, -1), bytes(DIGEST_BYTES)
    try:
        with Timed(path):
            descriptor, status = open_regular(path)
            try:
                # of before the content, so that a file written to meanwhile counts as changed
                stat = status.st_size, status.st_mtime_ns
                check_length(status.st_size)
                data = read_up_to(descriptor, status.st_size)
            finally:
                os.close(descriptor)
        digest = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
        decoded = examine(data, path, decoding)
    except OSError as error:
        return _FileScan(stat, digest, reason=str(bad_image(path, ValueError(error.strerror or str(error)))))
    except DataError as error:
        cause = error.__cause__
        span = cause.span if isinstance(cause, NoWhiteError) else None
        bands = cause.found if isinstance(cause, BandsError) else 0
        return _FileScan(stat, digest, reason=str(error), span=span, bands=bands)
    height, width, _ = decoded.pixels.shape
    histogram = channel_histogram(decoded.pixels)
    return _FileScan(stat, digest, (height, width), decoded.kind, histogram, "", decoded.tolerated, decoded.span)


# ---- statistics ------------------------------------------------------------------------------------------------------


def channel_histogram(pixels: np.ndarray) -> np.ndarray:
    """How often each channel has each value: (H, W, C) uint8 → (C, 256) int64."""
    if pixels.shape[2] == 3:  # in a tenth of the time
        return np.array(Image.fromarray(pixels).histogram(), dtype=np.int64).reshape(3, 256)
    return np.stack([np.bincount(band.ravel(), minlength=256) for band in np.moveaxis(pixels, 2, 0)])


def mean_and_std(histogram: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, scaled to 0..1, from exact counts (C, 256)."""
    values = np.arange(256) / 255
    count = histogram.sum(axis=1)
    mean = histogram @ values / count
    variance = (histogram * (values - mean[:, None]) ** 2).sum(axis=1) / count
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def duplicates(manifest: ScanManifest) -> list[np.ndarray]:
    """Positions of good files with identical bytes: one array per group of duplicates."""
    good = np.flatnonzero(manifest.sizes.min(axis=1) > 0)
    keys = np.ascontiguousarray(manifest.digests[good]).view(f"V{DIGEST_BYTES}").ravel()
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[inverse] > 1)
    order = repeated[np.argsort(inverse[repeated], kind="stable")]
    groups = np.split(good[order], np.flatnonzero(np.diff(inverse[order])) + 1) if len(order) else []
    return sorted(groups, key=lambda group: int(group[0]))
