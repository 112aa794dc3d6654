"""The baseline without colour: Pillow decodes and torchvision crops twice, in the workers of a DataLoader."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from pipelines.workers import worker_options


def plain_crops(index: ImageIndex, planner: Planner, side: int, device: torch.device, workers: int) -> Iterator[Tensor]:
    """Endless (B, 2, 3, S, S) uint8 batches on the device; their random numbers are torchvision's own."""
    a = planner.augmentation
    crop = T.Compose([T.RandomResizedCrop(side, scale=a.scale, ratio=a.ratio), T.PILToTensor()])

    def batches() -> Iterator[list[int]]:
        for step in itertools.count():
            yield planner.indices(step).tolist()

    loader = DataLoader(_Pairs(index, crop), batch_sampler=batches(), **worker_options(workers, device))  # type: ignore[arg-type]
    for pairs in loader:
        yield pairs.to(device, non_blocking=True)


class _Pairs(Dataset):
    def __init__(self, index: ImageIndex, crop: Callable[[Image.Image], Any]) -> None:
        self._index, self._crop = index, crop

    def __getitem__(self, i: int) -> Tensor:
        if self._index.paths is None:
            image = Image.fromarray(self._index.read(i))
        else:
            with Image.open(io.BytesIO(self._index.read_bytes(i))) as file:
                image = file.convert("RGB")
        return torch.stack([self._crop(image), self._crop(image)])
