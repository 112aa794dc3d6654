"""Worker processes that decode, crop and resize, and hand over uint8 crops in shared memory.

The device only ever receives crops of S×S bytes a channel: an eighth to a hundredth of what float views would take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.errors import DataError
from pipelines.image_index import ImageIndex
from pipelines.resident_crops import resize_box
from pipelines.views import BatchPlan, Crops
from pipelines.workers import checked, worker_options

# Images a worker takes at a time: small enough for all workers to share a batch, large enough to hide the hand-over.
CHUNK = 32
Task = tuple[ImageIndex, np.ndarray]


class TorchCrops:
    """A crop source on torch's own DataLoader. `workers` processes, or none (0) to decode in this process."""

    def __init__(self, index: ImageIndex, side: int, device: torch.device, workers: int) -> None:
        self._index, self._side, self._device, self._workers = index, side, device, workers

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        """Raises DataError for an image that cannot be read, and for a worker that died."""
        issued: deque[BatchPlan] = deque()
        tasks = _Tasks(self._index, plans, issued)
        options = worker_options(self._workers, self._device)
        parts = checked(DataLoader(_Decoder(self._side), batch_size=None, sampler=tasks, **options))
        for part in parts:
            plan = issued.popleft()
            views, count = plan.boxes.shape[:2]
            images = torch.empty((views, count, self._side, self._side, 3), dtype=torch.uint8, device=self._device)
            done = part.shape[1]
            images[:, :done].copy_(part, non_blocking=True)
            while done < count:
                part = next(parts)
                images[:, done : done + part.shape[1]].copy_(part, non_blocking=True)
                done += part.shape[1]
            yield Crops(images, plan)

    def close(self) -> None:
        """Nothing to give back: the workers belong to the iterators."""


class _Decoder(Dataset):
    """Decodes the images of a task once each, and crops every view: (views, b, S, S, 3) uint8."""

    def __init__(self, side: int) -> None:
        self._side = side

    def __getitem__(self, task: Task) -> Tensor | DataError:
        images, boxes = task
        out = torch.empty((*boxes.shape[:2], self._side, self._side, 3), dtype=torch.uint8)
        try:
            for row in range(len(images)):
                self._crop(images, row, boxes[:, row], out[:, row])
        except DataError as error:  # as a value, because the loader would wrap its one line in a traceback
            return error
        return out

    def _crop(self, images: ImageIndex, row: int, boxes: np.ndarray, out: Tensor) -> None:
        """Boxes (views, 4) of one image into (views, S, S, 3)."""
        reduction = _reduction(boxes, self._side)
        pixels = images.read(row, reduction)
        if reduction > 1 and pixels.shape[0] != images.sizes[row, 0]:
            reduced = Image.fromarray(pixels)
            for view, (top, left, height, width) in enumerate((boxes / reduction).tolist()):
                box = (left, top, min(left + width, reduced.width), min(top + height, reduced.height))
                crop = reduced.resize((self._side, self._side), Image.Resampling.BILINEAR, box)  # parts of pixels too
                out[view] = torch.from_numpy(np.array(crop))
            return
        whole = torch.from_numpy(np.require(pixels, requirements="W"))  # Pillow's are read-only
        for view, box in enumerate(boxes.tolist()):
            resize_box(whole, box, out[view])


def _reduction(boxes: np.ndarray, side: int) -> int:
    """The smallest size at which a JPEG may be decoded, as 1/r: every crop is still reduced by half or more after it.

    On photographs the views then differ from those of a whole decode by 1.3/255 in the mean and no pixel by more than
    12/255; allowed down to the crop's own size, by 3/255, and 2 % of the pixels by more than 12/255.
    """
    smallest = int(boxes[:, 2:].min())
    return next((r for r in (8, 4, 2) if smallest >= 2 * r * side), 1)


class _Tasks:
    """What the workers are to do, in order. Tasks carry their own small index, so that workers hold no data set."""

    def __init__(self, index: ImageIndex, plans: Iterable[BatchPlan], issued: deque[BatchPlan]) -> None:
        self._index, self._plans, self._issued = index, plans, issued

    def __iter__(self) -> Iterator[Task]:
        for plan in self._plans:
            self._issued.append(plan)
            for start in range(0, len(plan.indices), CHUNK):
                part = slice(start, start + CHUNK)
                yield self._index.select(plan.indices[part]), plan.boxes[:, part]
