"""Worker processes that decode, crop and resize, and write uint8 crops to shared memory.

The device receives only crops of S×S bytes per channel: an eighth to a hundredth of the size of float views.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.augment.resize import resize_box, resize_centre
from pipelines.backends.ring import Ring, SharedBytes
from pipelines.data.index import ImageIndex
from pipelines.errors import DataError
from pipelines.views import BatchPlan, Crops
from pipelines.workers import PREFETCHED, checked, worker_options

# Images per task: few enough for all workers to share a batch, enough to hide the cost of a task, which is 0.2 ms of
# this process. Up to four times as many if they are small: they decode in less time.
CHUNK = 32
_TASK_PIXELS = 128 * 32 * 32


class TorchCrops:
    """A crop source on torch's own DataLoader. `workers` processes, or none (0) to decode in this process."""

    def __init__(self, index: ImageIndex, side: int, device: torch.device, workers: int) -> None:
        self._index, self._side, self._device, self._workers = index, side, device, workers
        pixels = int(index.sizes.astype(np.int64).prod(axis=1).mean()) if len(index) else 1
        self.images_per_task = min(max(CHUNK, _TASK_PIXELS // pixels), 4 * CHUNK)

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        """No plan has more views or images than the first. Raises DataError for a bad image or a worker that died."""
        plans = iter(plans)
        first = next(plans, None)
        if first is None:
            return
        tasks_per_batch = -(-len(first.indices) // self.images_per_task)
        in_flight = max(1, self._workers * PREFETCHED)  # tasks, and one that has arrived
        ring = Ring(self._shape(first), (in_flight - 1) // tasks_per_batch + 1, self._device)
        try:
            yield from self._filled(ring, chain([first], plans))
        finally:
            ring.close()

    def _filled(self, ring: Ring, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        issued: deque[tuple[BatchPlan, int]] = deque()
        options = worker_options(self._workers, self._device)
        options["pin_memory"] = False  # it returns no tensors
        decoder = _Decoder(ring.memory, self._side)
        loader = DataLoader(decoder, batch_size=None, sampler=self._tasks(ring, plans, issued), **options)
        done = 0
        for rows in checked(loader):
            done += rows
            if done == len(issued[0][0].indices):
                plan, slot = issued.popleft()
                yield Crops(ring.hand_out(slot, self._shape(plan)), plan)
                done = 0

    def _tasks(self, ring: Ring, plans: Iterable[BatchPlan], issued: deque[tuple[BatchPlan, int]]) -> Iterator[_Task]:
        """The tasks of the workers, in order."""
        for plan in plans:
            slot = ring.take()
            issued.append((plan, slot))
            count = len(plan.indices)
            for first in range(0, count, self.images_per_task):
                rows = slice(first, first + self.images_per_task)
                images, boxes = self._index.select(plan.indices[rows]), plan.boxes[:, rows]
                yield _Task(ring.offset(slot), count, first, images, boxes, plan.shorter)

    def _shape(self, plan: BatchPlan) -> tuple[int, ...]:
        return (*plan.boxes.shape[:2], self._side, self._side, self._index.channels)

    def close(self) -> None:
        """Nothing to release: workers and memory belong to the iterators."""


class _Task(NamedTuple):
    """Some rows of a batch. A task carries its own small index, so workers hold no data set.

    offset  start of the batch (V, batch, S, S, C) in the shared memory
    first   row of the first of these images
    boxes   (V, images, 4)
    shorter  as in the plan
    """

    offset: int
    batch: int
    first: int
    images: ImageIndex
    boxes: np.ndarray
    shorter: int


class _Decoder(Dataset):
    """Decodes each image of a task once and writes the crops of every view. Returns the number of images."""

    def __init__(self, memory: SharedBytes, side: int) -> None:
        self._memory, self._side = memory, side

    def __getitem__(self, task: _Task) -> int | DataError:
        shape = (len(task.boxes), task.batch, self._side, self._side, task.images.channels)
        batch = self._memory.array[task.offset : task.offset + int(np.prod(shape))].reshape(shape)
        out = torch.from_numpy(batch[:, task.first :])
        try:
            for row in range(len(task.images)):
                self._crop(task, row, out[:, row])
        except DataError as error:  # as a value: the loader would wrap its one line in a traceback
            return error
        return len(task.images)

    def _crop(self, task: _Task, row: int, out: Tensor) -> None:
        """The views of one image into (views, S, S, C)."""
        image = torch.from_numpy(np.require(task.images.read(row), requirements="W"))  # Pillow's arrays are read-only
        if task.shorter:
            resize_centre(image, task.shorter, out[0])
            return
        for view, box in enumerate(task.boxes[:, row].tolist()):
            resize_box(image, box, out[view])
