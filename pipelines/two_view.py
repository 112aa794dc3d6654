"""Plans → crops → colour → Views on the training device, one batch ahead of the step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pipelines.augment_torch import apply
from pipelines.plans import Planner
from pipelines.transfer import to_device
from pipelines.views import Crops, CropSource, Views


class TwoViewPipeline:
    """Both views of every image of a run, in the same order and with the same numbers for any crop source.

    dtype is that of the views: the training dtype of the encoders.
    """

    def __init__(self, planner: Planner, source: CropSource, device: torch.device, dtype: torch.dtype) -> None:
        self.planner, self.source, self.device, self.dtype = planner, source, device, dtype

    def views(self, start: int, stop: int) -> Iterator[Views]:
        """The batches of steps `start` to `stop` - 1."""
        crops = self.source.crops(self.planner.plans(start, stop))
        if self.device.type == "cuda":
            yield from self._ahead(crops)
        else:
            for crop in crops:
                yield self._colour(crop)

    def _ahead(self, crops: Iterator[Crops]) -> Iterator[Views]:
        """Colours batch n + 1 in a stream of its own while the step works on batch n."""
        stream = torch.cuda.Stream(self.device)
        waiting: tuple[Views, torch.cuda.Event] | None = None
        while True:
            with torch.cuda.stream(stream):
                crop = next(crops, None)
                ready = None
                if crop is not None:
                    views, done = self._colour(crop), torch.cuda.Event()
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

    def _colour(self, crops: Crops) -> Views:
        plan = crops.plan
        count = len(plan.indices)
        source = np.concatenate([np.arange(count), count + plan.key_order])  # shuffles the keys on the way
        params = plan.params.reshape(2 * count, -1)[source]
        images = apply(crops.images.flatten(0, 1), params, self.planner.augmentation, self.dtype, source)
        return Views(
            images[:count],
            images[count:],
            to_device(plan.key_order, self.device),
            to_device(plan.indices, self.device),
        )

    def close(self) -> None:
        self.source.close()
