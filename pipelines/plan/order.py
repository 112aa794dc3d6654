"""Which images a step sees: pure functions of (seed, step). Nothing is stored, so nothing has to be resumed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pipelines.data.decode import printable
from pipelines.data.index import ImageIndex
from pipelines.errors import DataError
from pipelines.randomness import Domain, permutation, philox, uniform


def orders(name: str, index: ImageIndex, seed: int, buffer: int) -> Callable[[int], np.ndarray]:
    """Epoch → (N,) int64: `any` order of the images, or that of their `archives`.

    Raises DataError where the images are not in archives.
    """
    if name == "any":
        return partial(epoch_order, seed, count=len(index))
    assert name == "archives"
    if index.records is None or index.records.in_beton:
        raise DataError(
            f"--order archives is for tar archives, and {printable(index.describe())}; leave it out, or pack the "
            f"images with `python tools/make_shards.py DATA OUT --shuffle 0`"
        )
    return partial(archive_order, seed, archives=index.records.files, buffer=buffer)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) int64: every image once, in the order of this epoch."""
    return permutation(seed, Domain.ORDER, count, epoch=epoch)


def archive_order(seed: int, epoch: int, archives: np.ndarray, buffer: int) -> np.ndarray:
    """(N,) int64: every image once, archive after archive, for disks that are fast only in long reads.

    archives (N,) int is the archive of each image. Archives come in a random order, and then no image moves further
    than `buffer` places: the image at place p goes where p + buffer · u sorts it, u uniform in [0, 1). That mixes like
    a shuffle buffer of so many images, and is a function of (seed, epoch), so that any step can be found again.
    """
    names, files = np.unique(archives, return_inverse=True)
    rank = np.empty(len(names), dtype=np.int64)
    rank[permutation(seed, Domain.ORDER, len(names), slot=1, epoch=epoch)] = np.arange(len(names))
    in_line = np.argsort(rank[files], kind="stable")
    moved = uniform(philox(seed, Domain.ORDER, slot=2, sample=np.arange(len(archives)), epoch=epoch)[0])
    return in_line[np.argsort(np.arange(len(archives)) + buffer * moved, kind="stable")]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in an epoch; the images left over wait for another epoch's order, as in the authors' code."""
    return count // batch_size


def shard(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """A rank's contiguous share of a global batch (last axis). The batch must divide evenly."""
    share, rest = divmod(indices.shape[-1], world_size)
    assert rest == 0, f"a batch of {indices.shape[-1]} does not divide over {world_size} ranks"
    return indices[..., rank * share : (rank + 1) * share]
