"""Decodes images: the one definition of encoded bytes → upright RGB pixels, which every backend must match.

H, W height and width in pixels of the upright image

    encoded image                  pixels
    JPEG, grey or colour           libjpeg-turbo with its defaults: accurate integer IDCT, smooth upsampling
    JPEG, CMYK or YCCK             Pillow's conversion, with Adobe's inverted values restored
    palette, 1 bit, grey           the colours they represent; grey three times
    alpha                          dropped, not composited: the colours stored under transparent pixels show
    16 bits a channel              the high byte, value >> 8 (as Pillow, DALI and torchvision reduce colour);
                                   PPM and PGM, which state their own maximum, are scaled by it first
    32-bit integers or floats      refused: the value of white is undefined
    EXIF orientation               applied (EXIF only: the copy some editors write to XMP is not read)
    several frames                 the first
    colour profiles, PNG gamma     ignored, as every training pipeline does

A damaged file is refused if the damage is detectable: truncated data, wrong checksums, an invalid header. A flipped bit
inside JPEG data decodes to wrong pixels in every library; libjpeg only warns about it.
"""

from __future__ import annotations

import io
from typing import IO

import numpy as np
import torch
import torchvision  # noqa: F401 - registers torch.ops.image
from PIL import Image, ImageOps

from pipelines.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # by content, not by file name
MAX_PIXELS = 89_000_000  # more is refused from the header; just under the size at which Pillow warns

_ORIENTATION_TAG = 0x0112
_SIDES_SWAPPED = (5, 6, 7, 8)
_RGB_MODE = 3  # torchvision.io.ImageReadMode.RGB


def decode(data: bytes, name: str) -> np.ndarray:
    """Encoded bytes → (H, W, 3) uint8 RGB, upright, contiguous. Raises DataError giving `name` and the reason."""
    try:
        with open_image(io.BytesIO(data)) as image:
            orientation = exif_orientation(image)
            plain_jpeg = is_jpeg(image) and image.mode in ("L", "RGB")
            pixels = _decode_jpeg(data, image) if plain_jpeg else rgb(image)
        if image.format == "PNG":
            with open_image(io.BytesIO(data)) as again:
                again.verify()  # checksums, which Pillow does not check when decoding
    except Exception as error:  # untrusted bytes: a decoder may raise anything, and it all means a bad file
        raise bad_image(name, error) from error
    return np.ascontiguousarray(upright(pixels, orientation))


def open_image(stream: IO[bytes], formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Opens the image in `stream`, reading only its header. Raises Pillow's errors, and ValueError for a bomb."""
    start = stream.read(32)
    stream.seek(0)
    if not start:
        raise ValueError("the file is empty")
    try:
        image = Image.open(stream, formats=formats)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"it begins with {start[:16]!r}, which is none of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"its header claims more than {MAX_PIXELS:,} pixels, the limit") from error
    if image.width * image.height > MAX_PIXELS:
        claim = f"{image.width}×{image.height} pixels"
        image.close()
        raise ValueError(f"its header claims {claim}, more than the limit of {MAX_PIXELS:,}")
    return image


def is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")  # MPO: a phone's JPEG with further images after the first


def exif_orientation(image: Image.Image) -> int:
    """1 to 8, the orientation of the stored pixels; 1 (upright) if it is missing or invalid.

    TIFF is always 1: Pillow rotates it while loading.
    """
    data = image.info.get("exif")
    if not data or image.format == "TIFF":
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        orientation = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata is no bad image: viewers show it as stored
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of what `decode` returns, from the header alone. Not for TIFF, which Pillow rotates itself."""
    swapped = exif_orientation(image) in _SIDES_SWAPPED
    return (image.width, image.height) if swapped else (image.height, image.width)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(h, w, 3) as stored → (H, W, 3) upright, a view. EXIF 2.3, tag 0x0112: the sides that row 0 and column 0 show."""
    if orientation in _SIDES_SWAPPED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def bad_image(name: str, error: Exception) -> DataError:
    """An error of one line with the file name and the reason, from any exception of a decoder."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "incomplete or truncated" in reason:
        reason = "the JPEG data is incomplete or truncated"  # without torchvision's source location
    return DataError(f"{printable(name)} is not a usable image: {printable(reason)}; replace or remove it")


def printable(text: str) -> str:
    """`text` with control, bidi, undecodable and other unprintable characters as \\-escapes, safe in a terminal."""
    if text.isprintable():
        return text  # the usual case, and this runs for every image read
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _decode_jpeg(data: bytes, image: Image.Image) -> np.ndarray:
    """(h, w, 3) uint8 of a grey or colour JPEG, by the operator behind `torchvision.io.decode_jpeg`.

    Its pixels equal Pillow's, bit for bit (both use libjpeg-turbo), in a third of the time at 32 px, two thirds at 224
    px and five sixths at 500 px. torchvision has announced its removal; then Pillow is used.
    """
    if not hasattr(torch.ops.image, "decode_jpeg"):
        return rgb(image)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy: torch warns about read-only memory
    return torch.ops.image.decode_jpeg(encoded, _RGB_MODE, False).permute(1, 2, 0).numpy()


def rgb(image: Image.Image) -> np.ndarray:
    """The first frame of anything Pillow reads, as (h, w, 3) uint8."""
    image.load()
    if image.format == "TIFF":
        image = ImageOps.exif_transpose(image)  # a no-op if Pillow has already rotated it
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "32-bit floats"
        raise ValueError(f"it holds {kind}, for which white is undefined; convert it to 8 or 16 bits")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # directly to RGB, Pillow warns if some palette entries are transparent
    return np.asarray(image.convert("RGB"))
