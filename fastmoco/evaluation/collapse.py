"""Collapse diagnosis from features alone, without labels; every threshold is explained.

N images · D features
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.evaluation.geometry import alignment, effective_rank, uniformity
from fastmoco.run.verdict import MOMENTUM_REMEDY, UNRELATED_VIEWS, Verdict

State = Literal["collapsed", "few directions", "narrow", "views unrelated", "spread out"]

# bf16 has 8 significant bits: rounding errors are up to 0.4 %. Features that differ by no more are constant.
COLLAPSED_DISTANCE = 2.0**-8
# The means of C classes in general position span C - 1 directions. Without labels, ten classes are assumed. On the
# shapes data, EMA momentum 0, which fails to learn, gave rank 7 of 128, and momentum 0.99 gave 37.
MIN_DIRECTIONS = 9
# Untrained ResNets map all images into a narrow cone: measured 0.10 to 0.15 for three of them, above 0.9 when trained.
NARROW_DISTANCE = 0.3
# 0: all views of an image are equal; 1: two views of an image are no closer than views of two images. Halfway, features
# vary as much with the augmentation as with the image; near 1 they contain almost nothing of the image.
UNRELATED_SEPARATION = 0.9

_REMEDIES: dict[State, tuple[str, str]] = {
    "collapsed": ("collapsed", f"train again with {MOMENTUM_REMEDY}"),
    "few directions": ("collapsed", f"train again with {MOMENTUM_REMEDY}"),
    "narrow": ("not yet", "train for more --epochs, or with a higher --lr"),
    "views unrelated": ("not yet", "train for more --epochs, or weaken the augmentation (look at views.png)"),
    "spread out": ("learning", "the features can be used; more --epochs may still improve them"),
}


@dataclass(frozen=True)
class LabelFree:
    """Measures that need no labels, and the diagnosis.

    alignment       mean squared distance between two views of an image, both L2-normalised
    uniformity      log of the mean Gaussian potential of all pairs of images
    effective_rank  number of directions in which the centred features vary, of at most `most_directions`
    apart           RMS distance between two images, both L2-normalised: 0 to √2
    separation      squared distance between views of one image over that between views of two images: 0 to about 1
    """

    alignment: float
    uniformity: float
    effective_rank: float
    most_directions: int
    apart: float
    separation: float
    state: State
    verdict: str

    @property
    def learning(self) -> Verdict:
        """The diagnosis in the words of a verdict during training, with the reason and the remedy."""
        related = self.state != "spread out" or self.separation <= UNRELATED_VIEWS
        word, remedy = _REMEDIES[self.state if related else "views unrelated"]
        reason = re.sub("^(not )?collapsed(, but|:) ", "", self.verdict)
        return Verdict(word, f"{reason}: {remedy}")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def judge(features: Tensor, query: Tensor, key: Tensor, classes: int | None = None) -> LabelFree:
    """Diagnose features (N, D) of images, and query, key (V, D) of two random views of the same or other images.

    apart       = (2 - 2 * normalize(x).mean(0).square().sum()).sqrt()         over all N² pairs
    separation  = |q - k|².mean() / |q - k.roll(1)|².mean()                    for unit-norm q and k

    classes     number of classes in the data, if known
    Raises ValueError on other shapes and on values that are not finite.
    """
    if not (features.isfinite().all() and query.isfinite().all() and key.isfinite().all()):
        raise ValueError("the features are not finite")
    positives, negatives = alignment(query, key), alignment(query, key.roll(1, 0))
    unit = F.normalize(features.double(), dim=1)
    apart = max(0.0, 2 - 2 * unit.mean(0).square().sum().item()) ** 0.5
    rank = effective_rank(features - features.mean(0))
    max_rank = min(len(features) - 1, features.shape[1])
    separation = positives / negatives if negatives > 0 else 1.0
    state, verdict = _verdict(apart, rank, max_rank, separation, classes)
    return LabelFree(positives, uniformity(features), rank, max_rank, apart, separation, state, verdict)


def _verdict(apart: float, rank: float, max_rank: int, separation: float, classes: int | None) -> tuple[State, str]:
    if apart < COLLAPSED_DISTANCE:
        return "collapsed", (
            f"collapsed: normalised features of two images are {apart:.2g} apart (RMS), no more than bf16 rounding "
            f"({COLLAPSED_DISTANCE:.2g}): all images have the same features"
        )
    needed = min(max_rank, MIN_DIRECTIONS if classes is None else classes - 1)
    if rank < needed:
        count = "ten" if classes is None else f"{classes:,}"
        return "few directions", (
            f"partly collapsed: the features use {rank:.1f} of {max_rank:,} directions, and the means of {count} "
            f"classes need {needed:,}"
        )
    if apart < NARROW_DISTANCE:
        return "narrow", (
            f"not collapsed, but normalised features of two images are only {apart:.2f} apart (RMS): untrained "
            f"networks have about 0.1, trained ones more than {NARROW_DISTANCE:g}"
        )
    if separation > UNRELATED_SEPARATION:
        return "views unrelated", (
            f"not collapsed, but the squared distance between two views of an image is {separation:.0%} of that "
            f"between views of two images, above {UNRELATED_SEPARATION:.0%}: the features contain almost nothing of "
            f"the image"
        )
    return "spread out", (
        f"not collapsed: {rank:.1f} of {max_rank:,} directions are used, and the squared distance between two views of "
        f"an image is {separation:.0%} of that between views of two images"
    )
