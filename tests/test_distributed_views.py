"""Every rank makes its share of the views, and all shares together are what one rank would have made."""

from __future__ import annotations

import pytest
import torch

from pipelines.augment import CIFAR
from pipelines.image_index import ImageIndex
from pipelines.plans import Planner
from pipelines.resident_crops import ResidentCrops
from pipelines.shapes import make_shapes
from pipelines.torch_crops import TorchCrops
from pipelines.two_view import TwoViewPipeline
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
def test_all_shares_make_up_the_batch(images: ImageIndex, source_of, ranks: int, shuffle: bool) -> None:
    whole = views_of(images, source_of, shuffle=shuffle)
    shares = [views_of(images, source_of, shuffle=shuffle, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step, expected in enumerate(whole):
        mine = [share[step] for share in shares]
        for views in mine:
            assert views.query.shape == (BATCH // ranks, 3, 16, 16)
            assert views.query.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(views.key_order, expected.key_order)
        for field in ("query", "key", "index"):
            assert torch.equal(torch.cat([getattr(views, field) for views in mine]), getattr(expected, field)), field
