"""Every rank generates its shard of the views; concatenated, the shards are the views of one rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.augment.presets import CIFAR, Augmentation
from pipelines.backends.baseline import DataLoaderPipeline
from pipelines.backends.resident import ResidentCrops
from pipelines.backends.torch import TorchCrops
from pipelines.backends.two_view import TwoViewPipeline
from pipelines.data.index import ImageIndex
from pipelines.data.shapes import make_shapes
from pipelines.plan.planner import Planner
from pipelines.views import Views

BATCH = 16


@pytest.fixture(scope="module")
def images() -> ImageIndex:
    return ImageIndex.from_pixels("shapes", make_shapes(40, size=16)[0])


def views_of(images: ImageIndex, source_of, *, shuffle: bool, rank: int = 0, ranks: int = 1) -> list[Views]:
    cpu = torch.device("cpu")
    planner = Planner(
        images.sizes,
        seed=4,
        batch_size=BATCH,
        augmentation=CIFAR,
        shuffle_keys=shuffle,
        rank=rank,
        world_size=ranks,
    )
    pipeline = TwoViewPipeline(planner, source_of(images, 16, cpu, 0), cpu, torch.float32)
    try:
        return list(pipeline.views(1, 4))  # into the second epoch
    finally:
        pipeline.close()


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("source_of", [ResidentCrops, TorchCrops])
def test_all_shards_make_up_the_batch(images: ImageIndex, source_of, ranks: int, shuffle: bool) -> None:
    batches = views_of(images, source_of, shuffle=shuffle)
    shards = [views_of(images, source_of, shuffle=shuffle, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step, expected in enumerate(batches):
        parts = [shard[step] for shard in shards]
        for views in parts:
            assert views.query.shape == (BATCH // ranks, 3, 16, 16)
            assert views.query.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(views.key_order, expected.key_order)
        for field in ("query", "key", "index"):
            assert torch.equal(torch.cat([getattr(views, field) for views in parts]), getattr(expected, field)), field


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_the_baseline_shards_the_same_images(shuffle: bool) -> None:
    """Its crops and colours are random, so each image has one colour, which identifies it."""
    greys = np.arange(0, 240, 6, dtype=np.uint8)
    images = ImageIndex.from_pixels("greys", np.tile(greys[:, None, None, None], (1, 8, 8, 3)))
    plain = Augmentation(name="plain", scale=(1.0, 1.0), jitter_p=0.0, grey_p=0.0, mean=(0, 0, 0), std=(1, 1, 1))
    settings = {"seed": 4, "batch_size": BATCH, "augmentation": plain, "shuffle_keys": shuffle, "world_size": 2}
    planners = [Planner(images.sizes, rank=rank, **settings) for rank in range(2)]
    shards = []
    for planner in planners:
        pipeline = DataLoaderPipeline(images, planner, 8, torch.device("cpu"), torch.float32, 0)
        shards.append(next(pipeline.views(1, 2)))
    seen = [
        (255 * torch.cat([getattr(views, side) for views in shards])[:, 0, 0, 0]).round() for side in ("query", "key")
    ]
    indices, order = planners[0].indices(1), planners[0].key_order(1)
    np.testing.assert_array_equal(seen[0], greys[indices])
    np.testing.assert_array_equal(seen[1], greys[indices[order]])
    np.testing.assert_array_equal(torch.cat([views.index for views in shards]), indices)
