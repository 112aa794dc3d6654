"""WebP, BMP, GIF and Netpbm (PPM, PGM, PBM): read by Pillow, apart from what it reduces or refuses.

Whole is a file of which Pillow decodes every row.
"""

from __future__ import annotations

import re

import numpy as np

from pipelines.data.formats.common import TRUNCATED, Picture, check_size, open_image, rgb
from pipelines.data.formats.deep import Deep
from pipelines.data.formats.exif import orientation

DAMAGED_WEBP = "damaged WebP metadata"

_NETPBM = re.compile(
    rb"P([2356])((?:\s+(?:#[^\n]*\n\s*)*)\d+)((?:\s+(?:#[^\n]*\n\s*)*)\d+)((?:\s+(?:#[^\n]*\n\s*)*)\d+)"
)
_COMMENT = re.compile(rb"#[^\n]*")
_PADDED = ("BMP", "PPM")  # formats without compression, whose missing end is known to be pixels


def decode(data: bytes, accept: bool) -> Picture:
    """The first image of a file that is no JPEG, PNG or TIFF. `accept`: BMP and Netpbm with missing rows too."""
    if data[:2] in (b"P2", b"P3", b"P5", b"P6") and (picture := _deep_netpbm(data, accept)) is not None:
        return picture
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    with open_image(data, ("BMP", "PPM", "GIF")) as image:
        kind, size = f"{image.format} {image.mode}", image.width * image.height
        try:
            return Picture(rgb(image), kind)
        except (OSError, ValueError, IndexError) as error:
            if not accept or image.format not in _PADDED or data[:2] in (b"P1", b"P2", b"P3"):
                raise
            fault = error
    with open_image(data + bytes(4 * size + 4096), _PADDED) as image:  # at most 4 bytes a pixel
        try:
            return Picture(rgb(image), kind, tolerated=TRUNCATED)
        except (OSError, ValueError, IndexError):
            raise fault from None


def _webp(data: bytes) -> Picture:
    fault = ""
    try:
        with open_image(data, ("WEBP",)) as image:
            exif, mode, pixels = image.info.get("exif"), image.mode, rgb(image)
    except Exception:
        bare = _bare_webp(data)
        if bare is None:
            raise
        with open_image(bare, ("WEBP",)) as image:
            exif, mode, pixels, fault = None, image.mode, rgb(image), DAMAGED_WEBP
    turned, damage = orientation(exif) if exif else (1, "")
    return Picture(pixels, f"WEBP {mode}", turned, fault or damage)


def _bare_webp(data: bytes) -> bytes | None:
    """A WebP of the image chunk alone, or None if there is none or it is not complete.

    Its alpha may be in another chunk, and is dropped like all alpha.
    """
    at = 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            chunk = data[at : at + 8 + length]
            if len(chunk) < 8 + length:
                return None
            chunk += b"\0" * (length % 2)
            return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk
        at += 8 + length + length % 2
    return None


def _deep_netpbm(data: bytes, accept: bool) -> Picture | None:
    """A Netpbm file of more than 8 bits, whose colours Pillow would reduce; None for any other."""
    match = _NETPBM.match(data)
    if match is None:
        return None
    kind = int(match[1])
    width, height, white = (int(_COMMENT.sub(b"", match[group])) for group in (2, 3, 4))
    if not 255 < white < 65_536:
        return None
    check_size(width, height)
    channels, tolerated = 3 if kind in (3, 6) else 1, ""
    count = width * height * channels
    if kind in (5, 6):
        values = np.frombuffer(data[match.end() + 1 :][: 2 * count], dtype=np.uint8)
        if len(values) < 2 * count and accept:
            values, tolerated = np.pad(values, (0, 2 * count - len(values))), TRUNCATED
        values = values[: len(values) // 2 * 2].view(">u2")
    else:
        words = _COMMENT.sub(b"", data[match.end() :]).split()[:count]
        values = np.array([int(word) for word in words])
        if len(values) and not 0 <= values.min() <= values.max() <= white:
            raise ValueError(f"a value in it is above {white}, its own maximum")
    if len(values) < count:
        raise ValueError(f"the PPM data is truncated: it has {len(values):,} of {count:,} values")
    shape = (height, width, 3) if channels == 3 else (height, width)
    deep = Deep(values.astype(np.uint16).reshape(shape), white)
    return Picture(deep, f"PPM {'RGB' if channels == 3 else 'L'};16", tolerated=tolerated)
