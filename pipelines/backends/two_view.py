"""Plans → crops → colour → Views on the training device, by default one batch ahead of the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import c_ops, torch_ops
from pipelines.backends.resident import ResidentCrops
from pipelines.plan.ahead import planned_ahead
from pipelines.plan.planner import Planner
from pipelines.platforms import has_triton
from pipelines.transfer import packed_bytes, to_device_at_once
from pipelines.views import BatchPlan, Crops, CropSource, Views

BUFFERS = 2  # batches in device memory: the one in use, and the one being prepared


class TwoViewPipeline:
    """Both views of every image of a run, with the same order and parameters for any crop source.

    dtype     that of the views: the training dtype of the encoders
    triton    colour (and, from a resident source, crop) in Triton kernels; by default on CUDA
    prefetch  on CUDA, prepare a batch in another stream during the step on the one before, in the memory of two
    """

    def __init__(
        self,
        planner: Planner,
        source: CropSource,
        device: torch.device,
        dtype: torch.dtype,
        triton: bool | None = None,
        prefetch: bool = True,
    ) -> None:
        self.planner, self.source, self.device, self.dtype = planner, source, device, dtype
        self.prefetch = prefetch
        available = device.type == "cuda" and has_triton()
        self.triton = available if triton is None else triton

    def views(self, start: int, stop: int) -> Iterator[Views]:
        """The batches of steps `start` to `stop` - 1. On CUDA a batch is overwritten as `Views` says."""
        plans = self.planner.plans(start, stop)
        if self.device.type == "cuda":
            plans = planned_ahead(plans)
        if self.triton and isinstance(self.source, ResidentCrops):
            batches = ((plan, None) for plan in plans)
        else:
            batches = ((crops.plan, crops) for crops in self.source.crops(plans))
        if self.device.type == "cuda":
            return self._ahead(batches) if self.prefetch else self._in_turn(batches)
        return (self._views(plan, crops, _Buffer()) for plan, crops in batches)

    def _in_turn(self, batches: Iterator[tuple[BatchPlan, Crops | None]]) -> Iterator[Views]:
        """Prepares every batch in the training stream, after the step on the one before."""
        buffer = _Buffer()
        for plan, crops in batches:
            yield self._views(plan, crops, buffer)

    def _ahead(self, batches: Iterator[tuple[BatchPlan, Crops | None]]) -> Iterator[Views]:
        """Prepares a batch in a stream of its own while the training step works on the previous one.

        If the device has run out of work, as after a log, the batch that is ready is handed over before the next is
        prepared. Nothing waits on the host: the writing of a batch waits on the device until its buffer has been used.
        """
        loading, buffers = _loading_stream(self.device), deque(_Buffer() for _ in range(BUFFERS))
        ready: deque[tuple[Views, _Buffer]] = deque()
        handed_over: _Buffer | None = None
        while True:
            training = torch.cuda.current_stream(self.device)
            if handed_over is not None:
                handed_over.used.record(training)  # the consumer has enqueued all its work on that batch
                buffers.append(handed_over)
            enough = 1 if training.query() else BUFFERS
            while len(ready) < enough:
                with torch.cuda.stream(loading):
                    plan, crops = next(batches, (None, None))
                    if plan is None:
                        break
                    buffer = buffers.popleft()
                    loading.wait_event(buffer.used)
                    ready.append((self._views(plan, crops, buffer), buffer))
                    buffer.written.record(loading)
            if not ready:
                return
            views, handed_over = ready.popleft()
            training.wait_event(handed_over.written)
            handed_over.freed_after(training)
            yield views

    def _views(self, plan: BatchPlan, crops: Crops | None, buffer: _Buffer) -> Views:
        """Colours the crops of a plan; without crops, the resident source crops and colours in one kernel."""
        rows = plan.rows
        count = len(rows) // 2
        params = plan.params.reshape(-1, plan.params.shape[-1])[rows]
        arrays = [plan.key_order, plan.indices[:count]]
        if crops is None:
            arrays += [plan.boxes.reshape(-1, 4)[rows], params, np.tile(plan.indices, len(plan.boxes))[rows]]
        elif self.triton:
            arrays += [params, rows]
        order, index, *numbers = buffer.upload(arrays, self.device)
        augmentation, out = self.planner.augmentation, buffer.images
        if crops is None:
            assert isinstance(self.source, ResidentCrops)
            boxes, params, rows = numbers
            images = self.source.views(boxes, params, rows, augmentation, self.dtype, out)
        elif self.triton:
            from pipelines.augment import triton_ops  # Triton comes with torch's CUDA builds only

            params, rows = numbers
            images = triton_ops.apply(crops.images.flatten(0, 1), params, augmentation, self.dtype, rows, out)
        else:
            apply = c_ops.apply if self.device.type == "cpu" else torch_ops.apply
            images = apply(crops.images.flatten(0, 1), params, augmentation, self.dtype, rows, out)
        buffer.images = images
        return Views(images[:count], images[count:], order, index)

    def close(self) -> None:
        self.source.close()


class _Buffer:
    """The memory of one batch, allocated for the first and then reused."""

    def __init__(self) -> None:
        self.images: Tensor | None = None
        self._numbers: Tensor | None = None

    @cached_property
    def written(self) -> torch.cuda.Event:
        """Recorded after the batch is written."""
        return torch.cuda.Event()

    @cached_property
    def used(self) -> torch.cuda.Event:
        """Recorded after the last work on the batch."""
        return torch.cuda.Event()

    def upload(self, arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
        """The arrays as tensors on the device."""
        if device.type == "cuda" and self._numbers is None:
            self._numbers = torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=device)
        return to_device_at_once(arrays, device, self._numbers)

    def freed_after(self, stream: torch.cuda.Stream) -> None:
        """Once no longer referenced, the memory is reused only after the work in `stream`, not just in its own."""
        for tensor in (self.images, self._numbers):
            assert tensor is not None
            tensor.record_stream(stream)


@cache
def _loading_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream in which all pipelines prepare batches: torch keeps freed memory for the stream that allocated it."""
    return torch.cuda.Stream(device)
