"""How images reach a peer's step: a torch DataLoader that decodes and augments with Pillow and torchvision.

What a new epoch costs, when a DataLoader starts its workers again, is left out in the peers' favour: batches come
without end.
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
    """Arguments of a DataLoader; all but the number of workers at torch's default."""

    workers: int
    prefetched: int = 2
    pinned: bool = False


def tuned(workers: int) -> Loading:
    """What people set who tune a DataLoader."""
    return Loading(workers, prefetched=PREFETCHED, pinned=True)


class LabelledImages(Dataset):
    """(transform(image), label), from files as torchvision's ImageFolder or from memory as its CIFAR10.

    Pixels lie in shared memory, once for all workers, as they do where workers are forked.
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
    """The same images as pixels in memory. They must all be of one size."""
    if index.pixels is not None:
        return index
    return replace(index, paths=None, records=None, pixels=np.stack([index.read(i) for i in range(len(index))]))


def endless_views(dataset: Dataset, batch_size: int, device: torch.device, loading: Loading) -> Iterator[Views]:
    """Batches of a dataset whose samples begin with [query, key], in shuffled order, on the device.

    Raises DataError for an image that cannot be read and for a worker that died.
    """
    options = worker_options(loading.workers, device) | {"pin_memory": loading.pinned and device.type == "cuda"}
    if loading.workers:
        options["prefetch_factor"] = loading.prefetched
    order = torch.arange(batch_size, device=device)  # the peers shuffle keys themselves, or not at all
    with warnings.catch_warnings():
        # More workers than cores, as the peers' defaults may be, are what is measured here.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(dataset, batch_sampler=_shuffled(len(dataset), batch_size), **options)  # type: ignore[arg-type]
        batches = checked(loader)
        first = next(batches)
    yield _on(device, first, order)
    for batch in batches:
        yield _on(device, batch, order)


def _on(device: torch.device, batch: Any, order: Tensor) -> Views:
    query, key = (view.to(device, non_blocking=True) for view in batch[0])
    return Views(query, key, order, order)


def _shuffled(count: int, batch_size: int) -> Iterator[list[int]]:
    """Epoch after epoch in a new order, the last images of each dropped where they fill no batch."""
    while True:
        order = torch.randperm(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size].tolist()
