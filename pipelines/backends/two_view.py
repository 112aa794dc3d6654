"""Plans → crops → colour → Views on the training device, one batch ahead of the step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import torch_ops
from pipelines.backends.resident import ResidentCrops
from pipelines.plan.planner import Planner
from pipelines.transfer import to_device
from pipelines.views import BatchPlan, Crops, CropSource, Views


class TwoViewPipeline:
    """Both views of every image of a run, with the same order and parameters for any crop source.

    dtype   that of the views: the training dtype of the encoders
    triton  colour (and, from a resident source, crop) in Triton kernels; by default on CUDA
    """

    def __init__(
        self,
        planner: Planner,
        source: CropSource,
        device: torch.device,
        dtype: torch.dtype,
        triton: bool | None = None,
    ) -> None:
        self.planner, self.source, self.device, self.dtype = planner, source, device, dtype
        self.triton = device.type == "cuda" if triton is None else triton

    def views(self, start: int, stop: int) -> Iterator[Views]:
        """The batches of steps `start` to `stop` - 1."""
        plans = self.planner.plans(start, stop)
        if self.triton and isinstance(self.source, ResidentCrops):
            batches = (self._views(plan, None) for plan in plans)
        else:
            batches = (self._views(crops.plan, crops) for crops in self.source.crops(plans))
        return self._ahead(batches) if self.device.type == "cuda" else batches

    def _ahead(self, batches: Iterator[Views]) -> Iterator[Views]:
        """Prepares batch n + 1 in a separate stream while the training step works on batch n."""
        stream = torch.cuda.Stream(self.device)
        waiting: tuple[Views, torch.cuda.Event] | None = None
        while True:
            with torch.cuda.stream(stream):
                views, ready = next(batches, None), None
                if views is not None:
                    done = torch.cuda.Event()
                    done.record(stream)
                    ready = views, done
            if waiting is not None:
                views, done = waiting
                training = torch.cuda.current_stream(self.device)
                training.wait_event(done)
                for tensor in (views.query, views.key, views.key_order, views.index):
                    tensor.record_stream(training)
                yield views
            if ready is None:
                return
            waiting = ready

    def _views(self, plan: BatchPlan, crops: Crops | None) -> Views:
        """Colours the crops of a plan; without crops, the resident source crops and colours in one kernel."""
        source = plan.rows
        count = len(source) // 2
        if crops is None:
            assert isinstance(self.source, ResidentCrops)
            images = self.source.views(plan, self.planner.augmentation, self.dtype, source)
        else:
            params = plan.params.reshape(2 * count, -1)[source]
            images = self._apply(crops.images.flatten(0, 1), params, source)
        order, index = to_device(plan.key_order, self.device), to_device(plan.indices[:count], self.device)
        return Views(images[:count], images[count:], order, index)

    def _apply(self, crops: Tensor, params: np.ndarray, source: np.ndarray) -> Tensor:
        if not self.triton:
            return torch_ops.apply(crops, params, self.planner.augmentation, self.dtype, source)
        from pipelines.augment import triton_ops  # Triton comes with torch's CUDA builds only

        on_device = to_device(params, self.device), to_device(source, self.device)
        return triton_ops.apply(crops, on_device[0], self.planner.augmentation, self.dtype, on_device[1])

    def close(self) -> None:
        self.source.close()
