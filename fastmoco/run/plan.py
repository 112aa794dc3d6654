"""The plan of a run: which images are in a batch, and with which crops and colours."""

from __future__ import annotations

from fastmoco.config import ResolvedConfig
from fastmoco.config.augment import augmentation_of
from fastmoco.distributed.world import World
from pipelines.data.index import ImageIndex
from pipelines.plan.order import orders
from pipelines.plan.planner import Planner


def planner_of(config: ResolvedConfig, images: ImageIndex, world: World) -> Planner:
    """The batches of this rank."""
    data = config.data
    return Planner(
        images.sizes,
        seed=config.run.seed,
        batch_size=config.optim.batch_size,
        augmentation=augmentation_of(config.augment, data.channels),
        shuffle_keys=config.model.bn_splits != 1,
        rank=world.rank,
        world_size=world.size,
        order=orders(data.order, images, config.run.seed, data.order_buffer),
    )
