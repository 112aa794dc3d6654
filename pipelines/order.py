"""Which images a step sees: pure functions of (seed, step). Nothing is stored, so nothing has to be resumed."""

from __future__ import annotations

import numpy as np

from pipelines.randomness import Domain, permutation


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(count,) int64: every image once, in the order of this epoch."""
    return permutation(seed, Domain.ORDER, count, epoch=epoch)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in an epoch; the images left over wait for another epoch's order, as in the authors' code."""
    return count // batch_size


def shard(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """A rank's contiguous share of a global batch (last axis). The batch must divide evenly."""
    share, rest = divmod(indices.shape[-1], world_size)
    assert rest == 0, f"a batch of {indices.shape[-1]} does not divide over {world_size} ranks"
    return indices[..., rank * share : (rank + 1) * share]
