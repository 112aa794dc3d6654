"""One randomly cropped and flipped view of every labelled image and epoch, for probes that train on crops.

B images a step · S side of a view · N images
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.evaluation.features import normalised
from pipelines.data.index import ImageIndex
from pipelines.plan.boxes import sample_boxes
from pipelines.plan.order import epoch_order
from pipelines.plan.planner import eval_plans
from pipelines.randomness import Domain, philox, uniform
from pipelines.transfer import to_device
from pipelines.views import BatchPlan, CropSource

ViewKind = Literal["center", "padded", "resized"]
SCALE = (0.08, 1.0)  # of the area of a resized crop, as in the authors' linear classification
PAD = 1 / 8  # of the side: 4 of 32 pixels, as is usual on CIFAR (He et al. 2016, section 4.2)


@dataclass(frozen=True, eq=False)
class LabelledViews:
    """Views of the images of an index at `positions` (N,), with their `labels` (N,) int64.

    kind  "center": the view of the evaluation; "padded": that one, moved by up to an eighth of its side over a black
          border, and flipped or not; "resized": a random part of the image, resized, and flipped or not
    Order, crops and flips are pure functions of (seed, epoch, image).
    """

    index: ImageIndex
    positions: np.ndarray
    labels: np.ndarray
    source: CropSource
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: ViewKind
    batch_size: int
    seed: int = 0
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(len(self.positions), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def batches(self, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, 3, S, S) float32 normalised and channels-last, and labels (B,) int64, of all epochs in turn.

        The last batch of an epoch may be smaller, or is left out with `drop_last`. Raises DataError.
        """
        label_of = np.full(len(self.index), -1)
        label_of[self.positions] = self.labels
        for crops in self.source.crops(self._plans(epochs)):
            plan, images = crops.plan, crops.images[0]
            if self.kind == "padded":
                images = self._moved(images, plan)
            images = normalised(images, self.mean, self.std)
            if self.kind != "center":
                flips = uniform(philox(self.seed, Domain.COLOUR, sample=plan.indices, epoch=plan.epoch)[0]) < 0.5
                images = torch.where(to_device(flips, images.device).view(-1, 1, 1, 1), images.flip(-1), images)
            yield images, to_device(label_of[plan.indices], images.device)

    def _plans(self, epochs: int) -> Iterator[BatchPlan]:
        used = min(len(self.positions), self.steps_per_epoch * self.batch_size)
        for epoch in range(epochs):
            order = self.positions[epoch_order(self.seed, epoch, len(self.positions))[:used]]
            for plan in eval_plans(self.index.sizes, order, self.batch_size, self.side):
                boxes = plan.boxes
                if self.kind == "resized":
                    sizes = self.index.sizes[plan.indices]
                    boxes = sample_boxes(self.seed, epoch, plan.indices, sizes, SCALE)[:1]
                step = epoch * self.steps_per_epoch + plan.step
                yield replace(plan, step=step, epoch=epoch, boxes=boxes)

    def _moved(self, crops: Tensor, plan: BatchPlan) -> Tensor:
        """(B, S, S, 3) uint8: each somewhere else in its place, black where it has left it."""
        pad, side = max(1, round(PAD * self.side)), self.side
        words = philox(self.seed, Domain.BOX, sample=plan.indices, epoch=plan.epoch)[2:]
        offsets = np.floor(uniform(words) * (2 * pad + 1)).astype(np.int64)
        rows, columns = (
            to_device(offset[:, None] + np.arange(side), crops.device).view(len(crops), *shape)
            for offset, shape in zip(offsets, ((side, 1), (1, side)), strict=True)
        )
        padded = F.pad(crops, (0, 0, pad, pad, pad, pad))
        return padded[torch.arange(len(crops), device=crops.device).view(-1, 1, 1), rows, columns]
