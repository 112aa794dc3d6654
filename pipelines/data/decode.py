"""Decodes images: the one definition of encoded bytes → upright pixels, which every backend must match.

H, W height and width in pixels of the upright image · C channels, by default 3: red, green and blue

    encoded image                  pixels
    JPEG, grey or colour           libjpeg-turbo with its defaults: accurate integer IDCT, smooth upsampling
    JPEG, CMYK or YCCK             Pillow's conversion, with Adobe's inverted values restored
    palette, 1 bit, grey           the colours they represent; grey three times
    alpha                          dropped, not composited: the colours stored under transparent pixels show
    9 to 16 bits a channel         the high 8 bits; PPM and PGM, which state their own maximum, are scaled by it first
    signed, 32-bit, floats         refused: the value of white is undefined
    … with a value range           mapped linearly from it to 0..255 (`Decoding.value_range`)
    TIFF of several bands          as `formats.tiff` says; refused rather than guessed
    NumPy array                    as `formats.npy` says
    other channels than 3          the bands of the file (`Decoding.channels`, `formats.bands`), in which alpha counts
    EXIF orientation               applied (EXIF only: the copy some editors write to XMP is not read)
    several frames                 the first
    colour profiles, PNG gamma     ignored, as every training pipeline does

A file is refused if its pixels are not whole or known to be damaged: truncated data, wrong checksums, an invalid
header. What "whole" means is said for each format in `formats`. Faults of anything else, such as metadata or an end
marker, are tolerated and named. A flipped bit inside JPEG data decodes to wrong pixels in every library; libjpeg only
warns about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from pipelines.data.decoding import DEFAULT, Decoding
from pipelines.data.formats import exif, jpeg, npy, others, png, tiff, tiff_tags
from pipelines.data.formats.bands import luma, shaped
from pipelines.data.formats.common import Picture, rgb, upright
from pipelines.data.formats.deep import Deep, Span
from pipelines.data.formats.unsupported import UnsupportedError
from pipelines.data.printable import printable
from pipelines.errors import DataError


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image and what its file said.

    pixels     (H, W, C) uint8, upright, contiguous
    kind       format and mode, as in `JPEG RGB`
    tolerated  faults of the file that leave its pixels whole, or that they are truncated; empty without
    span       the range of its values, of more than 8 bits; None for others and unless asked for
    """

    pixels: np.ndarray
    kind: str
    tolerated: str
    span: Span | None


def decode(data: bytes, name: str, decoding: Decoding = DEFAULT) -> np.ndarray:
    """Encoded bytes → (H, W, C) uint8, upright, contiguous. Raises DataError giving `name` and the reason."""
    return examine(data, name, decoding, spans=False).pixels


def examine(data: bytes, name: str, decoding: Decoding = DEFAULT, *, spans: bool = True) -> Decoded:
    """`decode`, and what the file said.

    Raises DataError; its cause is a NoWhiteError if only a value range lacks, and a BandsError if the file has other
    bands than the channels that were asked for.
    """
    channels = decoding.channels
    try:
        picture = _read(data, decoding.truncated == "accept", spans or decoding.value_range is not None, channels)
        deep, pixels = None, picture.pixels
        if isinstance(pixels, Deep):
            deep, pixels = pixels, (pixels.rgb if channels == 3 else pixels.bands)(decoding.value_range)
        if channels != 3:
            pixels = shaped(pixels, picture.kind, data, channels)
        pixels = np.ascontiguousarray(upright(pixels, picture.orientation))
        span = deep.span() if deep is not None and spans else None
    except Exception as error:  # untrusted bytes: a decoder may raise anything, and it all means a bad file
        raise bad_image(name, error) from error
    return Decoded(pixels, picture.kind, picture.tolerated, span)


def _read(data: bytes, accept: bool, deep: bool, channels: int) -> Picture:
    if data.startswith(b"\xff\xd8"):
        return jpeg.decode(data, accept)
    if data.startswith(png.SIGNATURE):
        return png.decode(data, accept, deep)
    if data[:4] in tiff_tags.MAGICS and data[8:10] != b"CR":
        return tiff.decode(data, accept, channels)
    if data.startswith(npy.MAGIC):
        return npy.decode(data, channels)
    if data[8:10] == b"CR" and data[:4] in tiff_tags.MAGICS:
        raise UnsupportedError("it is raw camera data (CR2): develop it to JPEG or TIFF")
    return others.decode(data, accept)


def from_pil(image: Image.Image, channels: int = 3) -> np.ndarray:
    """(H, W, C) uint8, upright, of an image that Pillow has opened, colours as in `decode`.

    Raises ValueError for channels that Pillow's image does not have: it knows 1, 3, and 2 and 4 with alpha.
    """
    image.load()
    if image.format == "TIFF":
        image = ImageOps.exif_transpose(image)  # a no-op if Pillow has already rotated it
    pixels = rgb(image)
    if isinstance(pixels, Deep):
        white = 65_535 if image.mode == "I" and image.format in ("PNG", "PPM") else pixels.white
        pixels = Deep(pixels.values, white).rgb(None)
    data = None if image.format == "TIFF" else image.info.get("exif")
    if channels == 1:
        pixels = luma(pixels)
    elif channels != 3:
        if len(image.getbands()) != channels:
            raise ValueError(f"the image has the bands {', '.join(image.getbands())}, expected {channels}")
        alpha = np.asarray(image.getchannel(channels - 1))[..., None]
        pixels = np.concatenate([pixels if channels == 4 else luma(pixels), alpha], axis=2)
    return np.ascontiguousarray(upright(pixels, exif.orientation(data)[0])) if data else np.ascontiguousarray(pixels)


def bad_image(name: str, error: Exception) -> DataError:
    """An error of one line with the file name and the reason, from any exception of a decoder."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "incomplete or truncated" in reason:
        reason = "the JPEG data is incomplete or truncated"  # without torchvision's source location
    remedy = "" if isinstance(error, UnsupportedError) else "; replace or remove it"
    return DataError(f"{printable(name)} is not a usable image: {printable(reason)}{remedy}")
