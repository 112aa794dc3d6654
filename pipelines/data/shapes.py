"""`shapes`: ten classes of grey shapes drawn in memory. Small enough for a test, but a real task.

N images · S side in pixels

The kind of shape is the class; everything else is random: position, size, rotation, polarity (light on dark or dark on
light), contrast, background, noise. Neither mean nor colour separates the classes or the images. So raw pixels classify
poorly (see `tests/pipelines/data/test_shapes.py`), and features invariant to the rest classify well.
"""

from __future__ import annotations

import numpy as np

CLASS_NAMES = ("disc", "ring", "square", "frame", "triangle", "cross", "bar", "two bars", "star", "crescent")
TRAIN_COUNT = 4_000
TEST_COUNT = 1_000

RADIUS = (0.74, 0.95)  # of half the side: the circle that bounds a shape
CONTRAST = (0.22, 0.45)  # of the full range, between shape and background
BACKGROUND = (0.45, 0.55)
NOISE = 0.2  # peak to peak, uniform, independent in every pixel
CHUNK = 512  # images drawn at a time: bounds the temporaries to some 20 MB at side 32


def make_shapes(count: int, size: int = 32, seed: int = 0, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images `start` to `start + count` of the infinite sequence of `seed`; image i has class i mod 10.

    Image i is a pure function of (seed, size, i): disjoint ranges share no random numbers.

    Returns (count, size, size, 3) uint8 with three equal channels, and (count,) int64 labels.
    """
    indices = np.arange(start, start + count, dtype=np.int64)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for first in range(0, count, CHUNK):
        rows = slice(first, first + CHUNK)
        images[rows] = _draw(indices[rows], size, seed)[..., None]
    return images, indices % len(CLASS_NAMES)


def _draw(indices: np.ndarray, size: int, seed: int) -> np.ndarray:
    """(N,) indices → (N, S, S) uint8: coverage of each pixel from the signed distance to the shape, then noise."""
    # One generator per image. Its uniform numbers are 53 bits of a raw word, a stream that NumPy keeps stable.
    draws = np.stack([np.random.Generator(np.random.Philox(key=[seed, i])).random(7 + size * size) for i in indices])
    radius, angle, across, down, polarity, contrast, background = draws[:, :7].T[:, :, None, None]
    radius = _between(radius, RADIUS)
    angle = 2 * np.pi * angle
    contrast = np.where(polarity < 0.5, -1, 1) * _between(contrast, CONTRAST)
    noise = NOISE * (draws[:, 7:].reshape(-1, size, size) - 0.5)

    # Pixel centres in [-1, 1], shifted so that the bounding circle stays inside, rotated, in units of the radius.
    axis = (2 * np.arange(size) + 1) / size - 1
    u = (axis[None, None, :] - (1 - radius) * (2 * across - 1)) / radius
    v = (axis[None, :, None] - (1 - radius) * (2 * down - 1)) / radius
    x, y = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)

    classes = indices % len(CLASS_NAMES)
    distance = np.empty_like(x)
    for label in np.unique(classes):
        rows = classes == label
        distance[rows] = _distance(int(label), x[rows], y[rows])
    coverage = np.clip(0.5 - distance * radius * size / 2, 0, 1)  # distance in pixels: one pixel of soft edge
    image = _between(background, BACKGROUND) + contrast * coverage + noise
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _distance(label: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) to shape `label`, drawn in the unit circle; exact near straight edges."""
    r = np.hypot(x, y)
    match CLASS_NAMES[label]:
        case "disc":
            return r - 0.85
        case "ring":
            return np.abs(r - 0.76) - 0.16
        case "square":
            return _box(x, y, 0.68, 0.68)
        case "frame":
            return np.abs(_box(x, y, 0.58, 0.58)) - 0.12
        case "triangle":
            return np.maximum(-y, np.abs(x) * np.sqrt(0.75) + y / 2) - 0.5
        case "cross":
            return np.minimum(_box(x, y, 0.95, 0.24), _box(x, y, 0.24, 0.95))
        case "bar":
            return _box(x, y, 0.95, 0.26)
        case "two bars":
            return _box(x, np.abs(y) - 0.48, 0.82, 0.2)
        case "star":
            return _star(x, y, r, points=5, inner=0.38)
        case "crescent":
            return np.maximum(r - 0.95, 0.72 - np.hypot(x - 0.5, y))
    raise AssertionError(f"no shape {label}")


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _star(x: np.ndarray, y: np.ndarray, r: np.ndarray, points: int, inner: float) -> np.ndarray:
    """Distance to the line through a tip (1, 0) and a notch at radius `inner`, every point folded into that sector."""
    sector = np.pi / points
    folded = np.abs(np.mod(np.arctan2(y, x) + sector, 2 * sector) - sector)
    notch_x, notch_y = inner * np.cos(sector), inner * np.sin(sector)
    normal = np.array([notch_y, 1 - notch_x]) / np.hypot(notch_y, 1 - notch_x)
    return (r * np.cos(folded) - 1) * normal[0] + r * np.sin(folded) * normal[1]


def _between(uniform: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return limits[0] + (limits[1] - limits[0]) * uniform
