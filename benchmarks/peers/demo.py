"""A peer: the authors' CIFAR-10 demo (the notebook in facebookresearch/moco), a reimplementation with its defaults.

ResNet-18 with a 3×3 stem, batch norm in 8 splits, keys shuffled on one GPU, a queue of 4,096, SGD with a cosine
schedule, an EMA per parameter, float32; decoded images in memory, two torchvision transforms in 16 workers.
At 224 px the same step represents their ImageNet script: encoded images from files, 32 workers.
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure.plain import PlainStep, Task
from benchmarks.measure.sample_data import SMALL
from benchmarks.peers.loader import LabelledImages, Loading, decoded
from pipelines.augment.presets import Augmentation
from pipelines.backends.baseline import torchvision_transform
from pipelines.data.index import ImageIndex
from pipelines.views import Views

EPOCHS = 200


def default_loading(side: int) -> Loading:
    """The loader's settings in the notebook, or in the ImageNet script."""
    return Loading(workers=16 if side <= SMALL else 32, pinned=True)


class DemoStep(PlainStep):
    """`PlainStep` with the demo's symmetric loss and its learning rate.

    steps_per_epoch  the learning rate of epoch e is lr · (1 + cos(π e / 200)) / 2
    symmetric        also swap the views: the losses are added, and the keys of both enter the queue, 2N per step
    channels_last, dtype  as in `PlainStep`; channels-last uses our batch norm, because theirs does not support it
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        *,
        steps_per_epoch: int,
        symmetric: bool = False,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(task, device, channels_last=channels_last, dtype=dtype)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._steps_per_epoch, self._symmetric = steps_per_epoch, symmetric
        self._steps, self._losses = 0, list[float]()

    def __call__(self, views: Views) -> float:
        epoch, step_in_epoch = divmod(self._steps, self._steps_per_epoch)
        if step_in_epoch == 0:
            rate = self.task.lr * (1 + math.cos(math.pi * min(epoch, EPOCHS) / EPOCHS)) / 2
            self.optimiser.param_groups[0]["lr"] = rate
        self._steps += 1
        loss = super().__call__(views)
        self._losses.append(loss)
        return loss

    def loss(self, views: Views) -> tuple[Tensor, Tensor]:
        query, key = (images.to(memory_format=self._layout) for images in (views.query, views.key))
        loss, k = super().loss(Views(query, key, views.key_order, views.index))
        if not self._symmetric:
            return loss, k
        swapped_loss, k_of_query = super().loss(Views(key, query, views.key_order, views.index))
        return loss + swapped_loss, torch.cat([k_of_query, k])

    def read_loss(self) -> float:
        """Mean since the last call."""
        mean = sum(self._losses) / max(1, len(self._losses))
        self._losses.clear()
        return mean


def demo_dataset(index: ImageIndex, augmentation: Augmentation, side: int) -> LabelledImages:
    """The same transform twice on every image; small images are decoded first, as torchvision's CIFAR10 is an array."""
    if side <= SMALL and index.uniform_size is not None:
        index = decoded(index)
    return LabelledImages(index, _Pair(augmentation, side))


class _Pair:
    """Maps an image to [query, key]."""

    def __init__(self, augmentation: Augmentation, side: int) -> None:
        self._transform = torchvision_transform(augmentation, side)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [self._transform(image), self._transform(image)]
