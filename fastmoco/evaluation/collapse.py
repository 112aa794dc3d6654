"""Has the representation collapsed? An answer in words, from features alone, with the reason of every threshold.

N images · D features
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.evaluation.geometry import alignment, effective_rank, uniformity

State = Literal["collapsed", "few directions", "narrow", "views unrelated", "spread out"]

# bf16 keeps 8 bits: numbers come within 0.4 % of what they stand for. Features that differ by no more are one constant.
SAME = 2.0**-8
# Class means in general position span one direction fewer than there are classes. Without labels, ten classes' worth.
# Momentum 0, which fails to learn, left shapes 7 directions of 128, and 0.99 left 37.
FEW_DIRECTIONS = 9
# Untrained ResNets send all images into a narrow cone: measured 0.10 to 0.15 for three of them, above 0.9 when trained.
NARROW = 0.3
# Halfway between 0 (all views of an image alike) and 1 (two views are no closer than two images) there is as much of
# chance as of the image in where a view lies; near 1 there is nothing of it.
UNRELATED = 0.9


@dataclass(frozen=True)
class LabelFree:
    """What features tell without labels.

    alignment       mean squared distance of two views of an image, both of unit length
    uniformity      log of the mean Gaussian potential of all pairs of images
    effective_rank  directions that the features use about their mean, of `most_directions`
    apart           root mean squared distance of two images, in lengths of a feature: 0 to √2
    separation      squared distance of two views of an image, over that of views of two images: 0 to about 1
    """

    alignment: float
    uniformity: float
    effective_rank: float
    most_directions: int
    apart: float
    separation: float
    state: State
    verdict: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def judge(features: Tensor, query: Tensor, key: Tensor, classes: int | None = None) -> LabelFree:
    """Measures and judges features (N, D) of images, and (V, D) of two random views of other or the same images.

    apart       = (2 - 2 * normalize(x).mean(0).square().sum()).sqrt()         over all pairs, an image with itself too
    separation  = |q - k|².mean() / |q - k.roll(1)|².mean()                    for unit-norm q and k

    classes: how many the features are to tell apart, where that is known. Raises ValueError on other shapes and
    numbers that are not finite.
    """
    if not (features.isfinite().all() and query.isfinite().all() and key.isfinite().all()):
        raise ValueError("the features are not finite")
    near, far = alignment(query, key), alignment(query, key.roll(1, 0))
    spread = F.normalize(features.double(), dim=1)
    apart = max(0.0, 2 - 2 * spread.mean(0).square().sum().item()) ** 0.5
    rank = effective_rank(features - features.mean(0))
    most = min(len(features) - 1, features.shape[1])
    separation = near / far if far > 0 else 1.0
    state, verdict = _verdict(apart, rank, most, separation, classes)
    return LabelFree(near, uniformity(features), rank, most, apart, separation, state, verdict)


def _verdict(apart: float, rank: float, most: int, separation: float, classes: int | None) -> tuple[State, str]:
    if apart < SAME:
        return "collapsed", (
            f"collapsed: any two images are {apart:.2g} of a feature's length apart, no more than bf16 rounds "
            f"({SAME:.2g}), so all have the same features"
        )
    needed = min(most, FEW_DIRECTIONS if classes is None else classes - 1)
    if rank < needed:
        words = "the means of ten classes" if classes is None else f"the means of {classes:,} classes"
        return "few directions", (
            f"partly collapsed: the features use {rank:.1f} of {most:,} directions, and {words} need {needed:,}"
        )
    if apart < NARROW:
        return "narrow", (
            f"not collapsed, but any two images are only {apart:.2f} of a feature's length apart: untrained networks "
            f"have about 0.1, trained ones more than {NARROW:g}"
        )
    if separation > UNRELATED:
        return "views unrelated", (
            f"not collapsed, but two views of an image are {separation:.0%} as far apart (squared) as views of two "
            f"images, above {UNRELATED:.0%}: where a view lies says nearly nothing about its image"
        )
    return "spread out", (
        f"not collapsed: {rank:.1f} of {most:,} directions are used, and two views of an image are {separation:.0%} as "
        f"far apart (squared) as views of two images"
    )
