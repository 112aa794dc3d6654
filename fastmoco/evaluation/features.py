"""Images → features: every image of an index exactly once, through one centred view.

N images · D features · S side of a view
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipelines.data.index import ImageIndex
from pipelines.plan.planner import eval_plans
from pipelines.views import BatchPlan, Crops, CropSource

BATCH = 256


class TunedSource:
    """A crop source whose batches are worked on with as many CPU threads as `tuned` finds to be fastest."""

    def __init__(self, source: CropSource, tuned: Callable[[Iterator[Crops]], Iterator[Crops]]) -> None:
        self._source, self._tuned = source, tuned

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        return self._tuned(self._source.crops(plans))

    def close(self) -> None:
        self._source.close()


def normalised(crops: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, S, S, 3) uint8 to (B, 3, S, S) float32, channels-last in memory."""
    scale = torch.tensor(std, device=crops.device).mul_(255)
    shift = torch.tensor(mean, device=crops.device).div_(torch.tensor(std, device=crops.device))
    return (crops.float() / scale - shift).permute(0, 3, 1, 2)


@torch.no_grad()  # not in inference mode: a linear probe differentiates what comes back
def extract(
    function: Callable[[Tensor], Tensor],
    source: CropSource,
    index: ImageIndex,
    positions: np.ndarray,
    side: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch: int | None = None,
) -> Tensor:
    """`function` of (B, 3, S, S) normalised images, for the images of an index at these positions (N,).

    Returns (N, D) float32 on the device of the source. A last, smaller batch is padded by repeating its last image, so
    that a compiled function sees one shape, and the padding is cut off again. A batch has at most 256 images.
    """
    batch = batch or min(BATCH, len(positions))
    padded = np.concatenate([positions, np.repeat(positions[-1:], -len(positions) % batch)])
    found = None
    for number, crops in enumerate(source.crops(eval_plans(index.sizes, padded, batch, side))):
        part = function(normalised(crops.images[0], mean, std)).float()
        if found is None:  # in one piece, since a list and its concatenation would be held twice
            found = part.new_empty((len(padded), *part.shape[1:]))
        found[number * batch : (number + 1) * batch] = part
    assert found is not None, "no images"
    return found[: len(positions)]
