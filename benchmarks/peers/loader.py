"""The loader of the peers: a torch DataLoader that decodes and augments with Pillow and torchvision.

In the peers' favour batches are endless: a DataLoader that restarts its workers in every epoch would cost more.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.data.index import ImageIndex
from pipelines.views import Views
from pipelines.workers import PREFETCHED, checked, worker_options


@dataclass(frozen=True)
class Loading:
    """Arguments of a DataLoader, with torch's defaults except for the number of workers."""

    workers: int
    prefetched: int = 2
    pinned: bool = False


def tuned(workers: int) -> Loading:
    """The usual settings of a tuned DataLoader."""
    return Loading(workers, prefetched=PREFETCHED, pinned=True)


class LabelledImages(Dataset):
    """(transform(image), label), from files like torchvision's ImageFolder or from memory like its CIFAR10.

    Pixels are in shared memory, one copy for all workers, as with forked workers.
    """

    def __init__(self, index: ImageIndex, transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.transform = transform
        self._index = None if index.pixels is not None else index
        self._pixels = None if index.pixels is None else torch.from_numpy(index.pixels.copy()).share_memory_()
        self._labels = np.zeros(len(index), dtype=np.int64) if index.labels is None else index.labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = self._open(i)
        return image if self.transform is None else self.transform(image), int(self._labels[i])

    def _open(self, i: int) -> Image.Image:
        if self._pixels is not None:
            return Image.fromarray(self._pixels[i].numpy())
        assert self._index is not None
        if self._index.paths is None:
            return Image.fromarray(self._index.read(i))
        with Image.open(io.BytesIO(self._index.read_bytes(i))) as file:
            return file.convert("RGB")


def decoded(index: ImageIndex) -> ImageIndex:
    """The same images as pixels in memory; all must have the same size."""
    if index.pixels is not None:
        return index
    return replace(index, paths=None, records=None, pixels=np.stack([index.read(i) for i in range(len(index))]))


def endless_views(dataset: Dataset, batch_size: int, device: torch.device, loading: Loading) -> Iterator[Views]:
    """Shuffled batches on the device, from a dataset whose samples begin with [query, key].

    Raises DataError for an unreadable image and for a worker that died.
    """
    options = worker_options(loading.workers, device) | {"pin_memory": loading.pinned and device.type == "cuda"}
    if loading.workers:
        options["prefetch_factor"] = loading.prefetched
    order = torch.arange(batch_size, device=device)  # the peers shuffle keys in the step, or not at all
    with warnings.catch_warnings():
        # The peers' defaults may be more workers than cores, which is part of what is measured.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(dataset, batch_sampler=_shuffled(len(dataset), batch_size), **options)  # type: ignore[arg-type]
        batches = checked(loader)
        first = next(batches)
    yield _to_views(first, order, device)
    for batch in batches:
        yield _to_views(batch, order, device)


def _to_views(batch: Any, order: Tensor, device: torch.device) -> Views:
    query, key = (view.to(device, non_blocking=True) for view in batch[0])
    return Views(query, key, order, order)


def _shuffled(count: int, batch_size: int) -> Iterator[list[int]]:
    """Endless batches of indices, in a new order in every epoch, without its last incomplete batch."""
    while True:
        order = torch.randperm(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size].tolist()
