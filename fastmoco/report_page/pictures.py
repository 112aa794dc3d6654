"""Pictures of a run as data URIs, small enough for a page that is sent around."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pipelines.files import read_file

_MAX_WIDTH_PX = 1600
_QUALITY = 82  # of WebP
_SMALLER = 0.8  # factor on the width of a picture that is still too large
_MIN_WIDTH_PX = 320


@dataclass(frozen=True)
class Picture:
    """uri  a data URI; width, height  in pixels of the embedded picture"""

    uri: str
    width: int
    height: int


def embedded(path: Path, max_bytes: int) -> Picture | None:
    """A picture as it is if the file has at most `max_bytes`, else as WebP and reduced until it has.

    None if it cannot be read, such as one that is being written or was damaged.
    """
    try:
        data = read_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombWarning):
        return None
    except Image.DecompressionBombError:
        return None
    kind = f"image/{(image.format or 'png').lower()}"
    width = min(image.width, _MAX_WIDTH_PX)
    image = image.convert("RGB") if len(data) > max_bytes else image
    while len(data) > max_bytes and width >= _MIN_WIDTH_PX:
        size = (width, max(1, round(image.height * width / image.width)))
        out = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).save(out, "WEBP", quality=_QUALITY)
        data, kind, width = out.getvalue(), "image/webp", round(width * _SMALLER)
    with Image.open(io.BytesIO(data)) as final:
        return Picture(f"data:{kind};base64,{base64.b64encode(data).decode()}", *final.size)
