"""Feature extraction: each image once, from its centre crop.

N images · D features · S side of a view
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipelines.data.index import ImageIndex
from pipelines.plan.planner import eval_plans
from pipelines.transfer import to_device
from pipelines.views import BatchPlan, Crops, CropSource

BATCH = 256


class TunedSource:
    """A crop source whose consumer runs with the number of CPU threads that `tuned` finds to be fastest."""

    def __init__(self, source: CropSource, tuned: Callable[[Iterator[Crops]], Iterator[Crops]]) -> None:
        self._source, self._tuned = source, tuned

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        return self._tuned(self._source.crops(plans))

    def close(self) -> None:
        self._source.close()


class Normalise:
    """(B, S, S, 3) uint8 → (B, 3, S, S) float32: normalised by mean and standard deviation, channels-last in memory."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        deviation = np.asarray(std, dtype=np.float32)
        self._scale = to_device(deviation * np.float32(255), device)
        self._shift = to_device(np.asarray(mean, dtype=np.float32) / deviation, device)

    def __call__(self, crops: Tensor) -> Tensor:
        return (crops.float() / self._scale - self._shift).permute(0, 3, 1, 2)


@torch.no_grad()  # not inference_mode: the linear probe is trained on the result
def extract(
    function: Callable[[Tensor], Tensor],
    source: CropSource,
    index: ImageIndex,
    positions: np.ndarray,
    side: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Apply `function` to normalised centre crops (B, 3, S, S) of the images at positions (N,) of an index.

    Returns (N, D) float32 on the device of the source, for which the host does not wait. The last batch is padded by
    repeating its last image, so that a compiled function sees one shape; the padding is removed from the result. B is
    `batch`, or min(256, N) without. `out` (N, D) float32, if given, is filled and returned instead: a file in the
    memory of the host, say.
    """
    batch = batch or min(BATCH, len(positions))
    padded = np.concatenate([positions, np.repeat(positions[-1:], -len(positions) % batch)])
    features = normalise = None
    for number, crops in enumerate(source.crops(eval_plans(index.sizes, padded, batch, side))):
        images = crops.images[0]
        normalise = normalise or Normalise(mean, std, images.device)
        rows = function(normalise(images)).float()
        if out is not None:
            part = out[number * batch : (number + 1) * batch]
            part.copy_(rows[: len(part)])
            continue
        if features is None:  # allocated once: concatenating a list of batches would take twice the memory
            features = rows.new_empty((len(padded), *rows.shape[1:]))
        features[number * batch : (number + 1) * batch] = rows
    if out is not None:
        return out
    assert features is not None, "no images"
    return features[: len(positions)]
