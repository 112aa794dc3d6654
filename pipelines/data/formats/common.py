"""What the readers of all formats share: their result, the limit on sizes, orientation, and reading with Pillow."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.data.formats.deep import Deep
from pipelines.data.formats.unsupported import UnsupportedError, describe

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # by content, not by file name
MAX_PIXELS = 89_000_000  # more is refused from the header; just under the size at which Pillow warns

SIDES_SWAPPED = (5, 6, 7, 8)
TRUNCATED = "truncated: the last pixels are missing"  # what `Picture.tolerated` says of pixels that are not whole


@dataclass(frozen=True, slots=True)
class Picture:
    """The first image of a file, as it is stored.

    pixels       (h, w, 3) uint8, or values of more than 8 bits; of TIFF and NumPy (h, w, c) if other channels than 3
                 are asked for
    kind         format and mode, as in `JPEG RGB`
    orientation  1 to 8, EXIF's
    tolerated    faults of the file that leave its pixels whole, or `TRUNCATED`; empty without
    """

    pixels: np.ndarray | Deep
    kind: str
    orientation: int = 1
    tolerated: str = ""


def check_size(width: int, height: int) -> None:
    """Raises ValueError for a header that claims no pixels, or more than `MAX_PIXELS`."""
    if width < 1 or height < 1:
        raise ValueError(f"its header claims {width}×{height} pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"its header claims {width}×{height} pixels, more than the limit of {MAX_PIXELS:,}")


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Opens an image with Pillow, reading only its header. Raises Pillow's errors, and ValueError for a bomb."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError as error:
        raise unidentified(data) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"its header claims more than {MAX_PIXELS:,} pixels, the limit") from error
    try:
        check_size(image.width, image.height)
    except ValueError:
        image.close()
        raise
    return image


def unidentified(data: bytes) -> ValueError:
    """The error for bytes that no reader takes."""
    kind = describe(data)
    if kind is not None:
        return UnsupportedError(kind)
    return ValueError(f"it begins with {data[:16]!r}, which is none of {', '.join(FORMATS)}")


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(h, w, c) as stored → (H, W, c) upright, a view. EXIF 2.3, tag 0x0112: the sides that row 0 and column 0 show."""
    if orientation in SIDES_SWAPPED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def rgb(image: Image.Image) -> np.ndarray | Deep:
    """The first frame of anything that Pillow reads, as it is stored: (h, w, 3) uint8, or values of more bits."""
    image.load()
    if image.mode.startswith("I;16"):
        return Deep(np.asarray(image).astype(np.uint16), white=65_535)
    if image.mode in ("I", "F"):
        return Deep(np.asarray(image), white=None)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # directly to RGB, Pillow warns if some palette entries are transparent
    return np.asarray(image.convert("RGB"))


def join(faults: list[str]) -> str:
    """Several faults as one text, each once."""
    return ", ".join(dict.fromkeys(faults))
