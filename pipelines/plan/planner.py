"""The plan of every step: which images, which crops and which colours, computed on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from pipelines.augment.params import sample_params
from pipelines.augment.presets import Augmentation
from pipelines.plan.boxes import sample_boxes
from pipelines.plan.order import epoch_order, shard, steps_per_epoch
from pipelines.randomness import Domain, permutation
from pipelines.views import BatchPlan


class Planner:
    """Plans of a run: `plan(step)` is a pure function of (seed, step), the sizes of the images and the settings.

    sizes             (N, 2) int32 height and width of every image, upright
    batch_size        B images per step, over all ranks; N must be at least B
    shuffle_keys      whether the key batch has its own order (needed if batch norm normalises groups of the batch)
    rank, world_size  whose share of every step to plan: B/R contiguous rows. Concatenated in rank order, the shares are
                      the plan of a single rank, for any number of ranks
    order             epoch → (N,) int64, the order of the images in an epoch (`order.orders`); by default `epoch_order`
    """

    def __init__(
        self,
        sizes: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        augmentation: Augmentation,
        shuffle_keys: bool,
        rank: int = 0,
        world_size: int = 1,
        order: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        assert len(sizes) >= batch_size, "fewer images than a batch"
        assert batch_size % world_size == 0, f"a batch of {batch_size} does not divide over {world_size} ranks"
        self.sizes, self.seed, self.batch_size = sizes, seed, batch_size
        self.augmentation, self.shuffle_keys = augmentation, shuffle_keys
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = steps_per_epoch(len(sizes), batch_size)
        self.order = lru_cache(maxsize=2)(order or (lambda epoch: epoch_order(seed, epoch, len(sizes))))

    def preview(self, count: int) -> Planner:
        """Plans on a single rank of up to `count` of the first images, with the keys in the order of the queries."""
        return Planner(
            self.sizes,
            seed=self.seed,
            batch_size=min(count, self.batch_size),
            augmentation=self.augmentation,
            shuffle_keys=False,
            order=self.order,
        )

    def indices(self, step: int) -> np.ndarray:
        """(B,) int64: the images of a step, on all ranks."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def key_order(self, step: int) -> np.ndarray:
        """(B,) int64: the order of a step's key batch, over all ranks."""
        if not self.shuffle_keys:
            return np.arange(self.batch_size)
        epoch, batch = divmod(step, self.steps_per_epoch)
        return permutation(self.seed, Domain.SHUFFLE, self.batch_size, slot=batch, epoch=epoch)

    def shares(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(B/R,) int64 each: the images of the rows of this rank's query batch and of its key batch."""
        indices = self.indices(step)
        keys = indices[self.key_order(step)]
        return shard(indices, self.rank, self.world_size), shard(keys, self.rank, self.world_size)

    def plan(self, step: int) -> BatchPlan:
        """This rank's share of a step."""
        epoch = step // self.steps_per_epoch
        queries, keys = self.shares(step)
        if self.world_size > 1 and self.shuffle_keys:
            indices = np.concatenate([queries, keys])
            views = [
                (array[:1] for array in self._views(epoch, queries)),
                (array[1:] for array in self._views(epoch, keys)),
            ]
            boxes, params = (np.concatenate(arrays, axis=1) for arrays in zip(*views, strict=True))
        else:
            indices = queries
            boxes, params = self._views(epoch, queries)
        return BatchPlan(step, epoch, indices, boxes, params, self.key_order(step))

    def _views(self, epoch: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (2, n, 4) and parameters (2, n, P) of both views of these images."""
        a = self.augmentation
        boxes = sample_boxes(self.seed, epoch, indices, self.sizes[indices], a.scale, a.ratio)
        return boxes, sample_params(self.seed, epoch, indices, a)

    def plans(self, start: int, stop: int) -> Iterator[BatchPlan]:
        return (self.plan(step) for step in range(start, stop))


def eval_plans(sizes: np.ndarray, positions: np.ndarray, batch_size: int, side: int) -> Iterator[BatchPlan]:
    """Plans with one centred view of every image of `positions`, once and in order; the last plan may be smaller.

    Crops of up to 64 pixels are the largest centred square. Larger ones are the standard view of ImageNet evaluation: a
    resize of the shorter side to 256/224 of theirs, and a crop of the centre. Plans have boxes (1, B, 4), for larger
    crops the largest squares too, and no colour.
    """
    shorter = 0 if side <= 64 else round(side * 256 / 224)
    square = sizes.min(axis=1).astype(np.int32)
    corner = (sizes - square[:, None]) // 2
    boxes = np.concatenate([corner, square[:, None], square[:, None]], axis=1).astype(np.int32)
    for number, start in enumerate(range(0, len(positions), batch_size)):
        chosen = positions[start : start + batch_size]
        empty = np.empty((1, len(chosen), 0), dtype=np.float32)
        yield BatchPlan(number, 0, chosen, boxes[chosen][None], empty, np.arange(len(chosen)), shorter)
