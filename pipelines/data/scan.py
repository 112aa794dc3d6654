"""Every file of a data set read and decoded once: what it is, what it holds, and what is wrong with it.

N files · H, W height and width of an upright image
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.data.decode import bad_image, decode, open_image, printable
from pipelines.data.manifest import ScanManifest
from pipelines.errors import DataError
from pipelines.workers import start_worker

FILES_A_TASK = 64  # a few milliseconds of work and more, against 0.2 ms of handing over
DIGEST_BYTES = 16

Advance = Callable[[int, int], None]  # files and bad files since the last call


class _Found(NamedTuple):
    """One file. An image has a kind and a histogram (3, 256); a bad file has a reason instead."""

    stat: tuple[int, int]
    digest: bytes
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    histogram: np.ndarray | None = None
    reason: str = ""


class _Part(NamedTuple):
    """What a task found out; columns as in `ScanManifest`, kinds by name, the histograms of its images added up."""

    stats: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    kinds: list[str]
    histogram: np.ndarray
    bad: list[tuple[int, str]]


def scan(
    train: Sequence[str], others: Sequence[str], workers: int, advance: Advance = lambda files, bad: None
) -> ScanManifest:
    """Reads and decodes every file once.

    train, others  absolute paths; the pixels of `train` alone are counted in the histogram
    workers        processes, or 0 to work in this one. (Threads decode as fast on two cores above 100 pixels; at 32
                   pixels processes are a quarter faster, and more cores than that would wait for the interpreter.)
    advance        told about progress

    The result does not depend on the number of workers. Raises DataError where a process dies.
    """
    paths = (*train, *others)
    tasks = [*_cut(train), *_cut(others)]
    parts: list[_Part] = []
    for part in _run(tasks, workers):
        parts.append(part)
        advance(len(part.kinds), len(part.bad))
    kind_names = tuple(sorted({"", *(kind for part in parts for kind in part.kinds)}))
    number = {name: i for i, name in enumerate(kind_names)}
    assert len(number) <= 256, "formats times modes"
    starts = np.cumsum([0, *(len(task) for task in tasks)]).tolist()
    of_train = sum(1 for start in starts[:-1] if start < len(train))
    return ScanManifest(
        paths=paths,
        stats=np.concatenate([part.stats for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        kinds=np.array([number[kind] for part in parts for kind in part.kinds], dtype=np.uint8),
        kind_names=kind_names,
        digests=np.concatenate([part.digests for part in parts]),
        training=np.arange(len(paths)) < len(train),
        histogram=np.stack([part.histogram for part in parts[:of_train]]).sum(axis=0),
        bad=tuple((start + i, reason) for start, part in zip(starts, parts, strict=False) for i, reason in part.bad),
    )


def _cut(paths: Sequence[str]) -> list[Sequence[str]]:
    return [paths[start : start + FILES_A_TASK] for start in range(0, len(paths), FILES_A_TASK)]


def _run(tasks: list[Sequence[str]], workers: int) -> Iterator[_Part]:
    """The results of all tasks, in order."""
    if workers == 0:
        yield from map(_scan_part, tasks)
        return
    context = get_context("forkserver")  # a clean process: this one may run threads
    context.set_forkserver_preload(["pipelines.data.scan"])  # imports torch once
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=start_worker, initargs=(0,))
    done = 0
    try:
        for part in pool.map(_scan_part, tasks):
            yield part
            done += 1
    except BrokenProcessPool as error:
        first = printable(tasks[done][0])
        raise DataError(
            f"a process that reads images died, at {first} or soon after: see whether memory ran out, or find the file "
            f"that ends it with --workers 0"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _scan_part(paths: Sequence[str]) -> _Part:
    found = [_scan_file(path) for path in paths]
    histograms = [one.histogram for one in found if one.histogram is not None]
    return _Part(
        stats=np.array([one.stat for one in found], dtype=np.int64),
        sizes=np.array([one.size for one in found], dtype=np.int32),
        digests=np.frombuffer(b"".join(one.digest for one in found), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        kinds=[one.kind for one in found],
        histogram=np.stack([np.zeros((3, 256), dtype=np.int64), *histograms]).sum(axis=0),
        bad=[(i, one.reason) for i, one in enumerate(found) if one.reason],
    )


def _scan_file(path: str) -> _Found:
    """Never raises: whatever is wrong with a file becomes its reason."""
    stat, digest = (-1, -1), bytes(DIGEST_BYTES)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a listed pipe must not wait for a writer
        try:
            status = os.fstat(descriptor)  # before the content: a file that is written to meanwhile will look changed
            stat = status.st_size, status.st_mtime_ns
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read()
        finally:
            os.close(descriptor)
        digest = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
        pixels = decode(data, path)
    except OSError as error:
        return _Found(stat, digest, reason=str(bad_image(path, ValueError(error.strerror or str(error)))))
    except DataError as error:
        return _Found(stat, digest, reason=str(error))
    with open_image(io.BytesIO(data)) as image:
        kind = f"{image.format} {image.mode}"
    histogram = np.array(Image.fromarray(pixels).histogram(), dtype=np.int64).reshape(3, 256)
    return _Found(stat, digest, (pixels.shape[0], pixels.shape[1]), kind, histogram)


# ---- what follows from it --------------------------------------------------------------------------------------------


def mean_and_std(histogram: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, of values in 0..1; from exact counts (3, 256)."""
    values = np.arange(256) / 255
    count = histogram.sum(axis=1)
    mean = histogram @ values / count
    variance = (histogram * (values - mean[:, None]) ** 2).sum(axis=1) / count
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def duplicates(manifest: ScanManifest) -> list[np.ndarray]:
    """Positions of the good files whose content is the same, byte for byte: an array for each such content."""
    good = np.flatnonzero(manifest.sizes.min(axis=1) > 0)
    keys = np.ascontiguousarray(manifest.digests[good]).view(f"V{DIGEST_BYTES}").ravel()
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[inverse] > 1)
    order = repeated[np.argsort(inverse[repeated], kind="stable")]
    groups = np.split(good[order], np.flatnonzero(np.diff(inverse[order])) + 1) if len(order) else []
    return sorted(groups, key=lambda group: int(group[0]))
