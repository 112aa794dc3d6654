"""Colour, flip and blur: sampled on the host, applied on the device.

Sampling makes numbers (`sample_params`), applying them is deterministic (`apply`). So this plain torch version, a fused
kernel and torchvision's functional operations can be compared on the same parameters, and every backend shares one.

V views · S side · P columns of a parameter row
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from pipelines.randomness import Domain, philox, uniform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Column(IntEnum):
    """One view's row of numbers. A factor of 1 (hue: 0), or a sigma of 0, leaves the image as it is."""

    FLIP = 0
    ORDER = 1  # four operations of two bits each, the first in the lowest bits: see Op
    BRIGHTNESS = 2
    CONTRAST = 3
    SATURATION = 4
    HUE = 5
    GREY = 6
    BLUR_SIGMA = 7  # pixels
    SOLARISE = 8


class Op(IntEnum):
    """The operations of colour jitter, in torchvision's numbering."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


# every order of the four operations, packed as Column.ORDER holds it
ORDERS = np.array([sum(op << (2 * place) for place, op in enumerate(p)) for p in itertools.permutations(range(4))])


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A recipe for random views. Probabilities in [0, 1]; jitter strengths as in torchvision's ColorJitter."""

    name: str
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey_p: float = 0.2
    grey_first: bool = False
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


# He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020; as in their code, greyscale
# comes before the jitter.
V1 = Augmentation(name="v1", scale=(0.2, 1.0), jitter_p=1.0, hue=0.4, grey_first=True)
# Chen et al., "Improved baselines with momentum contrastive learning", 2020.
V2 = Augmentation(name="v2", scale=(0.2, 1.0), blur_p=0.5)
# The authors' CIFAR-10 demo.
CIFAR = Augmentation(name="cifar", scale=(0.08, 1.0), mean=CIFAR_MEAN, std=CIFAR_STD)
# Grill et al., "Bootstrap your own latent", 2020, table 6. There one view is always blurred and the other at times, and
# only that one solarised; here each view has the mean of their probabilities, so that either may be the query.
BYOL = Augmentation(name="byol", scale=(0.08, 1.0), saturation=0.2, blur_p=0.55, solarise_p=0.1)
AUGMENTATIONS = {a.name: a for a in (V1, V2, CIFAR, BYOL)}


def with_scale(augmentation: Augmentation, smallest: float) -> Augmentation:
    """The same recipe with another lower bound of the crop's area."""
    return replace(augmentation, scale=(smallest, augmentation.scale[1]))


def blur_taps(augmentation: Augmentation, side: int) -> int:
    """Odd width of the blur kernel in pixels: 3.5 sigma a side, as far as reflection at the border allows."""
    return 2 * min(int(np.ceil(3.5 * augmentation.blur_sigma[1])), side - 1) + 1


def sample_params(seed: int, epoch: int, samples: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """Parameter rows of both views of B images.

    Philox slot 0 gives (flip, order, jitter or not, grey), slot 1 the four jitter factors in the order of `Op`, and
    slot 2 (sigma, solarise, blur or not, unused).

    samples  (B,) positions in the data set. Returns (2, B, P) float32, columns as in `Column`.
    """
    a = augmentation
    slots, views = np.arange(3)[:, None, None], np.array([0, 1])[:, None]
    u = uniform(philox(seed, Domain.COLOUR, slot=slots, view=views, sample=samples, epoch=epoch))
    flip, order, jitter, grey = u[:, 0]
    factors = u[:, 1]
    sigma, solarise, blur, _ = u[:, 2]

    rows = np.empty((*flip.shape, len(Column)), dtype=np.float32)
    rows[..., Column.FLIP] = flip < a.flip_p
    rows[..., Column.ORDER] = ORDERS[(order * len(ORDERS)).astype(np.int64)]
    jittered = jitter < a.jitter_p
    for op, strength in ((Op.BRIGHTNESS, a.brightness), (Op.CONTRAST, a.contrast), (Op.SATURATION, a.saturation)):
        lowest = max(0.0, 1.0 - strength)
        factor = lowest + (1.0 + strength - lowest) * factors[op]
        rows[..., Column.BRIGHTNESS + op] = np.where(jittered, factor, 1.0)
    rows[..., Column.HUE] = np.where(jittered, a.hue * (2.0 * factors[Op.HUE] - 1.0), 0.0)
    rows[..., Column.GREY] = grey < a.grey_p
    low, high = a.blur_sigma
    rows[..., Column.BLUR_SIGMA] = np.where(blur < a.blur_p, low + (high - low) * sigma, 0.0)
    rows[..., Column.SOLARISE] = solarise < a.solarise_p
    return rows
