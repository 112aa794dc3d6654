"""What an image is: the one definition of encoded bytes → pixels, which every backend must agree with."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from pipelines.errors import DataError


def decode(data: bytes, name: str) -> np.ndarray:
    """Encoded bytes → (H, W, 3) uint8 RGB, upright. Raises DataError that gives `name` and the reason."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} cannot be decoded as an image ({error}); replace or remove it") from error


def printable(text: str) -> str:
    """`text` with control, bidi, undecodable and other unprintable characters as \\-escapes, safe in a terminal."""
    return "".join(c if c.isprintable() else c.encode("ascii", "backslashreplace").decode() for c in text)
