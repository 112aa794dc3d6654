"""The order of the images: pure functions of (seed, epoch), so a resumed run needs no stored state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pipelines.data.decode import printable
from pipelines.data.index import ImageIndex
from pipelines.errors import DataError
from pipelines.randomness import Domain, permutation, philox, uniform


def orders(name: str, index: ImageIndex, seed: int, buffer: int) -> Callable[[int], np.ndarray]:
    """The function epoch → (N,) int64 order of the images: `any` of all, or archive by archive (`archives`).

    Raises DataError for `archives` if the images are not in tar archives.
    """
    if name == "any":
        return partial(epoch_order, seed, count=len(index))
    assert name == "archives"
    if index.records is None or index.records.in_beton:
        raise DataError(
            f"--order archives is for tar archives, not for {printable(index.describe())}; omit it, or pack the "
            f"images with `python tools/make_shards.py DATA OUT --shuffle 0`"
        )
    return partial(archive_order, seed, archives=index.records.files, buffer=buffer)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) int64: every image once, in a random order for this epoch."""
    return permutation(seed, Domain.ORDER, count, epoch=epoch)


def archive_order(seed: int, epoch: int, archives: np.ndarray, buffer: int) -> np.ndarray:
    """(N,) int64: every image once, archive after archive, for disks that are fast only in sequential reads.

    archives (N,) int is the archive of each image. Archives are in random order; then each image moves by less than
    `buffer` positions: images are sorted by p + buffer · u, where p is the position and u is uniform in [0, 1). This
    mixes like a shuffle buffer of that size, but is a function of (seed, epoch), so a run can resume at any step.
    """
    names, files = np.unique(archives, return_inverse=True)
    rank = np.empty(len(names), dtype=np.int64)
    rank[permutation(seed, Domain.ORDER, len(names), slot=1, epoch=epoch)] = np.arange(len(names))
    by_archive = np.argsort(rank[files], kind="stable")
    shift = uniform(philox(seed, Domain.ORDER, slot=2, sample=np.arange(len(archives)), epoch=epoch)[0])
    return by_archive[np.argsort(np.arange(len(archives)) + buffer * shift, kind="stable")]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Full batches per epoch; remaining images are dropped for this epoch, as in the authors' code."""
    return count // batch_size


def shard(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """A rank's contiguous share of a global batch (last axis). The batch must divide evenly."""
    share, remainder = divmod(indices.shape[-1], world_size)
    assert remainder == 0, f"a batch of {indices.shape[-1]} does not divide over {world_size} ranks"
    return indices[..., rank * share : (rank + 1) * share]
