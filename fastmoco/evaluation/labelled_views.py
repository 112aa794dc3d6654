"""Labelled, randomly cropped and flipped views, one per image and epoch, for probes that train on augmented images.

B images per step · S side of a view · N images
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.evaluation.features import Normalise
from pipelines.data.index import ImageIndex
from pipelines.plan.boxes import sample_boxes
from pipelines.plan.order import epoch_order
from pipelines.plan.planner import eval_plans
from pipelines.randomness import Domain, philox, uniform
from pipelines.transfer import to_device
from pipelines.views import BatchPlan, CropSource

ViewKind = Literal["center", "padded", "resized"]
SCALE = (0.08, 1.0)  # area of a resized crop as a fraction of the image, as in the authors' `main_lincls.py`
PAD = 1 / 8  # of the side: 4 of 32 pixels, the standard on CIFAR (He et al. 2016, section 4.2)


@dataclass(frozen=True, eq=False)
class LabelledViews:
    """Views of the images of an index at `positions` (N,), with their `labels` (N,) int64.

    kind  "center": the centre crop; "padded": a random crop of the centre crop, zero-padded by an eighth of its side;
          "resized": a random resized crop. The last two are also flipped horizontally at random
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
        full, remainder = divmod(len(self.positions), self.batch_size)
        return full + (remainder > 0 and not self.drop_last)

    def batches(self, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of all epochs: (B, 3, S, S) float32, normalised and channels-last, and labels (B,) int64.

        The last batch of an epoch may be smaller; `drop_last` drops it. Raises DataError.
        """
        label_of = np.full(len(self.index), -1)
        label_of[self.positions] = self.labels
        normalise = None
        for crops in self.source.crops(self._plans(epochs)):
            plan, images = crops.plan, crops.images[0]
            if self.kind == "padded":
                images = self._padded_crop(images, plan)
            normalise = normalise or Normalise(self.mean, self.std, images.device)
            images = normalise(images)
            if self.kind != "center":
                flips = uniform(philox(self.seed, Domain.COLOUR, sample=plan.indices, epoch=plan.epoch)[0]) < 0.5
                images = torch.where(to_device(flips, images.device).view(-1, 1, 1, 1), images.flip(-1), images)
            yield images, to_device(label_of[plan.indices], images.device)

    def _plans(self, epochs: int) -> Iterator[BatchPlan]:
        used = min(len(self.positions), self.steps_per_epoch * self.batch_size)
        for epoch in range(epochs):
            order = self.positions[epoch_order(self.seed, epoch, len(self.positions))[:used]]
            for plan in eval_plans(self.index.sizes, order, self.batch_size, self.side):
                boxes, shorter = plan.boxes, plan.shorter
                if self.kind == "resized":
                    shorter = 0
                    sizes = self.index.sizes[plan.indices]
                    boxes = sample_boxes(self.seed, epoch, plan.indices, sizes, SCALE)[:1]
                step = epoch * self.steps_per_epoch + plan.step
                yield replace(plan, step=step, epoch=epoch, boxes=boxes, shorter=shorter)

    def _padded_crop(self, crops: Tensor, plan: BatchPlan) -> Tensor:
        """Random crops (B, S, S, 3) of the zero-padded uint8 images, at an offset of their own each."""
        pad, side = max(1, round(PAD * self.side)), self.side
        random = uniform(philox(self.seed, Domain.BOX, sample=plan.indices, epoch=plan.epoch)[2:])
        offsets = np.floor(random * (2 * pad + 1)).astype(np.int64)
        rows, columns = (
            to_device(offset[:, None] + np.arange(side), crops.device).view(len(crops), *shape)
            for offset, shape in zip(offsets, ((side, 1), (1, side)), strict=True)
        )
        padded = F.pad(crops, (0, 0, pad, pad, pad, pad))
        return padded[torch.arange(len(crops), device=crops.device).view(-1, 1, 1), rows, columns]
