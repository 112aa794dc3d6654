"""The bands of an image: from those that a file stores to the number of channels that was asked for.

h, w height and width as stored · C channels that were asked for
"""

from __future__ import annotations

import numpy as np

from pipelines.data.formats.common import open_image
from pipelines.data.formats.unsupported import UnsupportedError

_OF_MODES = {"1": 1, "L": 1, "LA": 2, "RGBA": 4, "PA": 4}  # bands of the modes in `Picture.kind`; of the others 3

_WEIGHTS = np.array([19595, 38470, 7471], dtype=np.uint32)
_VALUES_AT_ONCE = 2**24  # of a whole data set in memory


def counted_bands(count: int) -> str:
    """`1 band`, `4 bands`."""
    return f"{count} band{'s' * (count != 1)}"


class BandsError(UnsupportedError):
    """An image whose bands are not as many as the channels that were asked for. `found` is their number."""

    def __init__(self, found: int, channels: int, text: str = "") -> None:
        self.found = found
        super().__init__(text or f"it has {counted_bands(found)}, and {channels} are expected: give --channels {found}")


def shaped(pixels: np.ndarray, kind: str, data: bytes, channels: int) -> np.ndarray:
    """(h, w, c) uint8 as read → (h, w, C), for C other than 3.

    One channel is grey: red, green and blue are weighted as by Pillow's conversion to L. Two and four channels may be
    grey and alpha, and red, green, blue and alpha. Raises BandsError for another number of bands.

    kind, data  `Picture.kind` and the bytes of the file, for its alpha
    """
    stored, mode = kind.split(" ")[0], kind.split(" ")[-1].split(";")[0]
    if channels == 1 and pixels.shape[2] in (1, 3):
        return luma(pixels)
    bands = pixels.shape[2] if stored in ("TIFF", "NPY") else _OF_MODES.get(mode, 3)
    if bands != channels:
        raise BandsError(bands, channels)
    if pixels.shape[2] == channels:
        return pixels
    colours = pixels if channels == 4 else luma(pixels)
    with open_image(data) as image:
        alpha = np.asarray(image.convert("RGBA" if channels == 4 else "LA").getchannel("A"))
    return np.concatenate([colours, alpha[..., None]], axis=2)


def luma(pixels: np.ndarray) -> np.ndarray:
    """(…, 3) uint8 → (…, 1) uint8: 0.299 R + 0.587 G + 0.114 B, with the rounding of Pillow's mode L; grey stays."""
    if pixels.shape[-1] == 1:
        return pixels
    grey, parts = np.empty((*pixels.shape[:-1], 1), dtype=np.uint8), max(1, pixels.size // _VALUES_AT_ONCE)
    for part, out in zip(np.array_split(pixels, parts), np.array_split(grey, parts), strict=True):
        out[..., 0] = (part.astype(np.uint32) @ _WEIGHTS + 0x8000) >> 16
    return grey
