"""Generates a corpus of unusual and of bad image files, one of each kind that occurs in real data sets.

Every good file has the pixels it must decode to; every bad file has its error message and when it must be detected.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tiff_writer import tiff

HEIGHT, WIDTH = 40, 56


@dataclass(frozen=True, eq=False)
class GoodFile:
    """`pixels` (H, W, 3) uint8 is the upright content of `data`; `tolerance` the largest mean error by compression."""

    name: str
    data: bytes
    pixels: np.ndarray
    tolerance: float = 0.0


@dataclass(frozen=True)
class BadFile:
    """`reason` is a pattern of the message; `in_header` is whether indexing must detect it, before training."""

    name: str
    data: bytes
    reason: str
    in_header: bool = True


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(height, width, 3) uint8: smooth, different from all its rotations and reflections, includes 0 and 255."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height - 1, width - 1]).reshape(2, 1, 1)
    return np.rint(np.stack([255 * x, 255 * y, 255 * (x * x + y * y * y) / 2], axis=2)).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """The bytes of `image` as Pillow writes format `kind`."""
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind, **options)
    return stream.getvalue()


def png(pixels: np.ndarray, depth: int, colour: int) -> bytes:
    """A PNG written without Pillow: `pixels` (H, W, C) uint8 or uint16, bits per channel, colour type."""
    pixels = pixels.astype(">u2") if depth == 16 else pixels
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a camera in that orientation stores: the inverse of the transform of EXIF 2.3, tag 0x0112."""
    inverse = {
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),  # counter-clockwise; viewers rotate it clockwise
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    return np.ascontiguousarray(inverse[orientation])


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@cache
def good_files() -> list[GoodFile]:
    return [*_good_jpeg(), *_good_png(), *_good_others(), *_good_names(), *_good_but_faulty()]


def _good_jpeg() -> list[GoodFile]:
    rgb = picture()
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    best: dict[str, Any] = {"quality": 95, "subsampling": 0}
    plain = encode(rgb, "JPEG", **best)
    turned = [
        GoodFile(f"exif{i}.jpg", encode(stored_as(rgb, i), "JPEG", exif=exif(i), **best), rgb, 2) for i in range(1, 9)
    ]
    return [
        *turned,
        GoodFile("exif-absurd.jpg", encode(rgb, "JPEG", exif=exif(77), **best), rgb, 2),
        GoodFile(
            "exif-broken.jpg",
            encode(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fjunk", dpi=(72, 72), **best),
            rgb,
            2,
        ),
        GoodFile("progressive.jpg", encode(rgb, "JPEG", progressive=True, **best), rgb, 2),
        GoodFile("grey.JPG", encode(grey[..., 0], "JPEG", **best), grey, 2),
        GoodFile("cmyk.jpeg", encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", **best), rgb, 2),
        GoodFile("profile-200kB.jpg", encode(rgb, "JPEG", icc_profile=bytes(200_000), **best), rgb, 2),
        GoodFile("junk-behind.jpg", plain + bytes(10_000), rgb, 2),
        GoodFile("mpo.jpg", encode(rgb, "MPO", save_all=True, append_images=[_negative(rgb)], **best), rgb, 2),
        GoodFile("gif-inside.jpg", encode(Image.fromarray(grey[..., 0]), "GIF"), grey),
        GoodFile("png-inside.jpg", encode(rgb, "PNG"), rgb),
    ]


def _good_png() -> list[GoodFile]:
    rgb = picture()
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    alpha = rgb[::-1, :, 1:2]
    deep = rgb.astype(np.uint16) << 8 | rgb[::-1]  # arbitrary low bytes, which must be ignored
    palette = Image.fromarray(rgb).quantize(32)
    colours = np.asarray(palette.convert("RGB"))
    bits = rgb[..., 0] > 127
    frames = {"save_all": True, "append_images": [_negative(rgb)]}
    return [
        GoodFile("rgb.png", encode(rgb, "PNG"), rgb),
        GoodFile("one-pixel.png", encode(rgb[:1, :1], "PNG"), rgb[:1, :1]),
        GoodFile("grey.png", encode(grey[..., 0], "PNG"), grey),
        GoodFile("one-bit.png", encode(bits, "PNG"), np.repeat(bits[..., None] * np.uint8(255), 3, axis=2)),
        GoodFile("palette.png", encode(palette, "PNG"), colours),
        GoodFile("palette-transparent.png", encode(palette, "PNG", transparency=bytes(range(32))), colours),
        GoodFile("rgba.png", encode(np.concatenate([rgb, alpha], axis=2), "PNG"), rgb),
        GoodFile("grey-alpha.png", png(np.concatenate([grey[..., :1], alpha], axis=2), 8, 4), grey),
        GoodFile("exif6.png", encode(stored_as(rgb, 6), "PNG", exif=exif(6)), rgb),
        GoodFile("animated.png", encode(rgb, "PNG", **frames), rgb),
        GoodFile("grey16.png", png(deep[..., :1], 16, 0), grey),
        GoodFile("rgb16.png", png(deep, 16, 2), rgb),
        GoodFile("rgba16.png", png(np.concatenate([deep, deep[..., :1]], axis=2), 16, 6), rgb),
    ]


def _good_others() -> list[GoodFile]:
    rgb = picture()
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    deep = rgb[..., 0].astype(np.uint16) << 8 | 0xC8  # rounding would give one more
    frames = {"save_all": True, "append_images": [_negative(rgb)]}
    return [
        GoodFile("lossless.webp", encode(rgb, "WEBP", lossless=True), rgb),
        GoodFile("lossy.webp", encode(rgb, "WEBP", quality=95), rgb, 4),
        GoodFile("animated.webp", encode(rgb, "WEBP", lossless=True, **frames), rgb),
        GoodFile("exif8.webp", encode(stored_as(rgb, 8), "WEBP", lossless=True, exif=exif(8)), rgb),
        GoodFile("rgb.BMP", encode(rgb, "BMP"), rgb),
        GoodFile("rgb.tif", encode(rgb, "TIFF"), rgb),
        GoodFile("lzw.tiff", encode(rgb, "TIFF", compression="tiff_lzw"), rgb),
        GoodFile("exif6.tif", encode(stored_as(rgb, 6), "TIFF", exif=exif(6)), rgb),
        GoodFile("cmyk.tif", encode(Image.fromarray(rgb).convert("CMYK"), "TIFF"), rgb),
        GoodFile("grey16.tif", encode(deep, "TIFF"), grey),
        GoodFile("pages.tif", encode(rgb, "TIFF", **frames), rgb),
        GoodFile("rgb.ppm", encode(rgb, "PPM"), rgb),
        GoodFile("grey.pgm", encode(grey[..., 0], "PPM"), grey),
        GoodFile("grey16.pgm", encode(deep, "PPM"), grey),
        GoodFile(
            "ascii.pnm", b"P3 # by hand\n2 1 255\n255 0 1  2 3 4\n", np.array([[[255, 0, 1], [2, 3, 4]]], np.uint8)
        ),
    ]


def _good_names() -> list[GoodFile]:
    rgb = picture()
    names = ["Äpfel und 桜.png", "txt.\u202egnp.png", "new\nline.png", "esc\x1b[31m.png", os.fsdecode(b"caf\xe9.png")]
    return [GoodFile(name, encode(rgb, "PNG"), rgb) for name in names]


def _good_but_faulty() -> list[GoodFile]:
    """Files whose pixels are whole, and with them what Pillow decodes wrongly or refuses."""
    rgb = picture()
    best: dict[str, Any] = {"quality": 95, "subsampling": 0}
    jpeg, flat = encode(rgb, "JPEG", **best), encode(rgb, "PNG")
    tables, text = jpeg.index(b"\xff\xdb"), bytearray(png_with(flat, b"tEXt", b"Comment\0text"))
    text[text.index(b"tEXt") + 8] ^= 1
    webp = bytearray(encode(rgb, "WEBP", lossless=True))
    webp[4:8] = b"\xff\xff\xff\x7f"
    deep = rgb.astype(np.uint16) * 257
    return [
        GoodFile("faulty-end.jpg", jpeg[:-2], rgb, 2),
        GoodFile("faulty-half-end.jpg", jpeg[:-1], rgb, 2),
        GoodFile("faulty-end-progressive.jpg", encode(rgb, "JPEG", progressive=True, **best)[:-2], rgb, 2),
        GoodFile("faulty-segments.jpg", jpeg[:tables] + b"\0\1\2" + jpeg[tables:], rgb, 2),
        GoodFile("faulty-text.png", png_with(flat, b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20))), rgb),
        GoodFile("faulty-profile.png", png_with(flat, b"iCCP", b"icc\0\0" + zlib.compress(bytes(3 << 20))), rgb),
        GoodFile("faulty-checksum.png", bytes(text), rgb),
        GoodFile("faulty-end.png", flat[:-12], rgb),
        GoodFile("faulty-half-end.png", flat[:-5], rgb),
        GoodFile("faulty-size.webp", bytes(webp), rgb),
        GoodFile("faulty-planar16.tif", tiff(deep, 2, planar=True), rgb),
        GoodFile("faulty-bands.tif", tiff(rgb, 1, planar=True, compression="deflate"), rgb),
        GoodFile("faulty-12.ppm", b"P6 56 40 4080\n" + (rgb.astype(np.uint16) * 16).astype(">u2").tobytes(), rgb),
    ]


def png_with(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk, after its header."""
    return data[:33] + _chunk(kind, content) + data[33:]


@cache
def bad_files() -> list[BadFile]:
    rgb = picture(200, 300)
    jpeg, flat = encode(rgb, "JPEG"), encode(rgb, "PNG")
    damaged = bytearray(flat)
    damaged[len(flat) // 2] ^= 0xFF
    cut = [
        BadFile(f"cut.{kind.lower()}", encode(rgb, kind)[:-600], "trunca" if kind != "WEBP" else "decoder")
        for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
    ]
    return [
        *cut,
        BadFile("cut-by-half.jpg", jpeg[: len(jpeg) // 2], "trunca"),
        BadFile("cut-in-header.jpg", jpeg[:100], "truncated: its header"),
        BadFile("start-of-image-alone.jpg", jpeg[:2], "truncated: its header"),
        BadFile("empty.jpg", b"", "empty"),
        BadFile("text.jpg", b"this is not an image\n" * 20, "begins with b'this is not an i'"),
        BadFile("page.png", b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page: the download failed"),
        BadFile("zeros.png", bytes(5000), "zeros alone"),
        BadFile("noise.jpg", np.random.Generator(np.random.Philox(5)).bytes(5000), "none of JPEG"),
        BadFile("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript: convert it"),
        BadFile("bomb.png", _bomb(20_000), "20000×20000 pixels|more than 89,000,000 pixels"),
        BadFile("claim.jpg", _claim(jpeg, 65_000), "65000×65000 pixels|more than 89,000,000 pixels"),
        BadFile("float.tif", encode(rgb[..., 0].astype(np.float32), "TIFF"), "32-bit floats"),
        BadFile("integer.tif", encode(rgb[..., 0].astype(np.int32), "TIFF"), "32-bit signed integers"),
        BadFile("bit-flipped.png", bytes(damaged), "", in_header=False),
    ]


def write_files(folder: Path, files: list[GoodFile] | list[BadFile]) -> list[Path]:
    """Write the files to `folder`, which is created; returns their paths, in the same order."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file.name).write_bytes(file.data)
    return [folder / file.name for file in files]


def fill(folder: Path, *names: str) -> Path:
    """Write a small PNG under each of these relative names; returns the folder."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(4, 3) + np.uint8(i), "PNG"))
    return folder


def _negative(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(255 - pixels)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _bomb(side: int) -> bytes:
    """A valid PNG of side² black pixels of one bit: 48 kB that decode to gigabytes."""
    packed = png(np.zeros((side, side // 8), dtype=np.uint8), 1, 0)  # eight pixels a byte: an eighth of the width
    narrow, wide = (_chunk(b"IHDR", struct.pack(">IIBBBBB", w, side, 1, 0, 0, 0, 0)) for w in (side // 8, side))
    return packed.replace(narrow, wide)


def _claim(jpeg: bytes, side: int) -> bytes:
    """The JPEG with `side` written into its frame header (SOF0: length, precision, height, width)."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + struct.pack(">HH", side, side) + jpeg[at + 9 :]
