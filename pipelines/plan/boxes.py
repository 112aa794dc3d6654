"""RandomResizedCrop boxes (Szegedy et al., "Going deeper with convolutions", CVPR 2015), drawn as in torchvision.

B images · a box is (top, left, height, width) in whole pixels of the upright image.
"""

from __future__ import annotations

import numpy as np

from pipelines.randomness import Domain, philox, uniform

ATTEMPTS = 10


def sample_boxes(
    seed: int,
    epoch: int,
    samples: np.ndarray,
    sizes: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Samples the boxes of both views.

    An attempt draws an area uniform in `scale` of the image and an aspect ratio log-uniform in `ratio`. The first of
    ten attempts that fits gets a uniform position; if none fits, the box is the largest centred one of a permitted
    ratio. The attempt number is the Philox slot, and its four words are (area, ratio, top, left).

    samples  (B,) positions in the data set; sizes  (B, 2) height and width
    Returns (2, B, 4) int32.
    """
    views = np.array([[0], [1]])
    height, width = (np.broadcast_to(side, (2, len(samples))) for side in sizes.T.astype(np.float64))
    boxes = _largest_centred(height, width, ratio)
    pending = np.ones((2, len(samples)), dtype=bool)
    view_of, sample_of = np.broadcast_arrays(views, samples)
    log_ratio = np.log(ratio)
    for attempt in range(ATTEMPTS):
        words = philox(seed, Domain.BOX, slot=attempt, view=view_of[pending], sample=sample_of[pending], epoch=epoch)
        area, aspect, top, left = uniform(words)
        full_h, full_w = height[pending], width[pending]
        target = full_h * full_w * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * aspect)
        box_h, box_w = np.rint(np.sqrt(target / aspect)), np.rint(np.sqrt(target * aspect))
        fits = (box_h > 0) & (box_w > 0) & (box_h <= full_h) & (box_w <= full_w)
        top, left = np.floor(top * (full_h - box_h + 1)), np.floor(left * (full_w - box_w + 1))
        drawn = np.stack([top, left, box_h, box_w], axis=-1).astype(np.int32)
        accepted = pending.copy()
        accepted[pending] = fits
        boxes[accepted] = drawn[fits]
        pending &= ~accepted
        if not pending.any():
            break
    return boxes


def _largest_centred(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """(..., 4) int32: the whole image, trimmed to the nearest permitted aspect ratio, centred."""
    box_w = np.minimum(width, np.rint(height * ratio[1]))
    box_h = np.minimum(height, np.rint(width / ratio[0]))
    return np.stack([(height - box_h) // 2, (width - box_w) // 2, box_h, box_w], axis=-1).astype(np.int32)
