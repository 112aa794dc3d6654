"""The random parameters of an augmentation: sampled on the host, one row of numbers per view.

`sample_params` draws all random numbers; applying them is deterministic. Plain torch (`augment.torch_ops`) and the
fused kernels (`augment.triton_ops`) are compared on the same parameters, and every backend shares them.

V views · S side · P columns of a parameter row
"""

from __future__ import annotations

import itertools
from enum import IntEnum

import numpy as np

from pipelines.augment.presets import Augmentation
from pipelines.randomness import Domain, philox, uniform


class Column(IntEnum):
    """Columns of a view's parameter row. A factor of 1 (hue: 0) or a sigma of 0 leaves the image unchanged."""

    FLIP = 0
    ORDER = 1  # four operations of two bits each, the first in the lowest bits: see Op
    BRIGHTNESS = 2
    CONTRAST = 3
    SATURATION = 4
    HUE = 5
    GREY = 6
    BLUR_SIGMA = 7  # pixels
    SOLARISE = 8
    VERTICAL_FLIP = 9


class Op(IntEnum):
    """The operations of colour jitter, in torchvision's numbering."""

    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


# every order of the four operations, packed as in Column.ORDER
ORDERS = np.array([sum(op << (2 * i) for i, op in enumerate(p)) for p in itertools.permutations(range(4))])


def blur_taps(augmentation: Augmentation, side: int) -> int:
    """Odd width of the blur kernel in pixels: 3.5 sigma to either side, as far as reflection at the border allows."""
    return 2 * min(int(np.ceil(3.5 * augmentation.blur_sigma[1])), side - 1) + 1


def sample_params(seed: int, epoch: int, samples: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """Draws the parameter rows of both views of B images.

    Philox slot 0 gives (flip, order, jitter or not, grey), slot 1 the four jitter factors in the order of `Op`, and
    slot 2 (sigma, solarise, blur or not, vertical flip): each number is drawn whether it is used or not, so that
    switching one operation off leaves the others as they are.

    samples  (B,) positions in the data set. Returns (2, B, P) float32, columns as in `Column`.
    """
    a = augmentation
    slots, views = np.arange(3)[:, None, None], np.array([0, 1])[:, None]
    u = uniform(philox(seed, Domain.COLOUR, slot=slots, view=views, sample=samples, epoch=epoch))
    flip, order, jitter, grey = u[:, 0]
    factors = u[:, 1]
    sigma, solarise, blur, vertical_flip = u[:, 2]

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
    rows[..., Column.VERTICAL_FLIP] = vertical_flip < a.vertical_flip_p
    return rows
