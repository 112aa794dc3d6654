"""PNGs: only the chunks that make pixels matter, and these exactly."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.decode import decode, examine
from pipelines.data.decoding import Decoding
from pipelines.data.formats.common import TRUNCATED
from pipelines.data.formats.png import NO_END
from pipelines.data.headers import inspect_header
from pipelines.errors import DataError
from tests.oddities import encode, exif, picture, png_with, stored_as

RGB = picture()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(rows: bytes, width: int, height: int, depth: int, colour: int, *chunks: bytes, parts: int = 1) -> bytes:
    """A PNG of raw rows with filter bytes, its image data in several chunks, other chunks before it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    packed = zlib.compress(rows)
    step = -(-len(packed) // parts)
    image = b"".join(chunk(b"IDAT", packed[i : i + step]) for i in range(0, len(packed), step))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + image + chunk(b"IEND", b"")


def several(parts: int = 4) -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in RGB)
    return png_of(rows, RGB.shape[1], RGB.shape[0], 8, 2, parts=parts)


def indexed(path: Path, data: bytes, decoding: Decoding | None = None) -> str:
    """What indexing says of the file: its faults, or `bad`; decoding must say the same."""
    path.write_bytes(data)
    decoding = decoding or Decoding()
    try:
        decoded = examine(data, str(path), decoding)
    except DataError:
        with pytest.raises(DataError):
            inspect_header(str(path), decoding)
        return "bad"
    header = inspect_header(str(path), decoding)
    assert header.size == decoded.pixels.shape[:2]
    return header.tolerated


@pytest.mark.parametrize(
    "kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"cHRM", b"tIME", b"pHYs", b"eXIf", b"xyZz"]
)
def test_other_chunks_may_be_damaged_or_large(kind: bytes, tmp_path: Path):
    for content in (b"", b"key\0\0" + zlib.compress(bytes(2_000_000)), b"\xff" * 100_000):
        data = png_with(encode(RGB, "PNG"), kind, content)
        np.testing.assert_array_equal(decode(data, "x"), RGB)
        at = data.index(kind)
        for damage in (at + 4 + len(content), at - 4, at - 1):  # the checksum, and the length: too long, a bit too long
            broken = bytearray(data)
            broken[damage] ^= 0x21
            assert (
                f"PNG {kind.decode()} chunk" in (said := indexed(tmp_path / "x.png", bytes(broken)))
                or "damaged" in said
            )
            np.testing.assert_array_equal(decode(bytes(broken), "x"), RGB)


@pytest.mark.slow  # 5,000 files
def test_every_truncation_is_refused_or_harmless(tmp_path: Path):
    """Whole is what holds the last byte of the last chunk of image data, with its checksum."""
    data = several()
    last = data.rindex(b"IDAT")
    whole = last + 4 + int.from_bytes(data[last - 4 : last]) + 4
    for length in range(len(data)):
        said = indexed(tmp_path / "x.png", data[:length])
        assert said == ("bad" if length < whole else NO_END), length
    assert indexed(tmp_path / "x.png", data + b"behind") == ""


def test_damaged_image_data_is_refused(tmp_path: Path):
    """Any byte of the header, palette and image chunks: refused, or decoded to the same pixels; accepted or not."""
    palette = encode(np.asarray(RGB)[..., 0], "PNG")
    for data in (several(), palette):
        want = decode(data, "x")
        for at in [*range(8, 60), *range(60, len(data) - 12, 29)]:
            broken = bytearray(data)
            broken[at] ^= 0x10
            for decoding in (Decoding(), Decoding(truncated="accept")):
                try:
                    np.testing.assert_array_equal(decode(bytes(broken), "x", decoding), want)
                except DataError:
                    continue


def test_accepted_truncation_keeps_what_is_there(tmp_path: Path):
    accept = Decoding(truncated="accept")
    noise = np.random.Generator(np.random.Philox(4)).integers(0, 256, RGB.shape, np.uint8)
    for data in (several(), encode(noise, "PNG")):
        whole = decode(data, "x")
        cut = data[: len(data) // 2]
        assert indexed(tmp_path / "x.png", cut) == "bad"
        assert indexed(tmp_path / "x.png", cut, accept) == TRUNCATED
        pixels = decode(cut, "x", accept)
        rows = (pixels == whole).all(axis=(1, 2))
        assert rows[:10].all()
        assert (pixels[-5:] == 0).all()
    assert indexed(tmp_path / "x.png", several()[:40], accept) == "bad"


@pytest.mark.parametrize("rows", [0, 30, 39])
@pytest.mark.parametrize(("depth", "kind"), [(8, np.uint8), (16, ">u2")])
def test_image_data_that_ends_early_in_whole_chunks(rows: int, depth: int, kind: str):
    """All chunks are right, and rows are missing: Pillow would return zeros for them without an error."""
    values = RGB.astype(kind) * (257 if depth == 16 else 1)
    short = png_of(b"".join(b"\0" + row.tobytes() for row in values[:rows]), 56, 40, depth, 2)
    with pytest.raises(DataError, match="trunca"):
        decode(short, "x")
    decoded = examine(short, "x", Decoding(truncated="accept"))
    assert decoded.tolerated == TRUNCATED
    np.testing.assert_array_equal(decoded.pixels[:rows], RGB[:rows])
    assert not decoded.pixels[rows:].any()


@pytest.mark.parametrize(
    ("depth", "colour", "channels"), [(1, 0, 1), (2, 0, 1), (4, 0, 1), (8, 4, 2), (16, 4, 2), (16, 6, 4)]
)
def test_every_depth_with_and_without_transparency(depth: int, colour: int, channels: int):
    """Few bits are scaled to 255; 16 bits keep the high byte; a transparent colour is a colour."""
    values = np.random.Generator(np.random.Philox(5)).integers(0, 2**depth, (6, 16, channels))
    rows = b"".join(
        b"\0" + int("".join(f"{v:0{depth}b}" for v in row.reshape(-1)), 2).to_bytes(16 * channels * depth // 8)
        for row in values
    )
    transparent = [chunk(b"tRNS", struct.pack(">H", int(values[0, 0, 0])))] if colour == 0 else []
    data = png_of(rows, 16, 6, depth, colour, *transparent)
    grey = values >> (depth - 8) if depth > 8 else values * 255 // (2**depth - 1)
    want = grey[..., :3] if channels == 4 else np.repeat(grey[..., :1], 3, axis=2)
    np.testing.assert_array_equal(decode(data, "x"), want)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_short_palettes(depth: int):
    colours = np.random.Generator(np.random.Philox(6)).integers(0, 256, (min(2**depth, 11) - 1 or 1, 3), np.uint8)
    indices = np.arange(16 * 6).reshape(6, 16) % len(colours)
    rows = b"".join(b"\0" + int("".join(f"{v:0{depth}b}" for v in row), 2).to_bytes(16 * depth // 8) for row in indices)
    chunks = chunk(b"PLTE", colours.tobytes()), chunk(b"tRNS", b"\0\x80")
    np.testing.assert_array_equal(decode(png_of(rows, 16, 6, depth, 3, *chunks), "x"), colours[indices])


def test_exif_counts_only_if_it_is_right(tmp_path: Path):
    turned = encode(stored_as(RGB, 6), "PNG", exif=exif(6))
    np.testing.assert_array_equal(decode(turned, "x"), RGB)
    broken = bytearray(turned)
    broken[broken.index(b"eXIf") + 6] ^= 1
    assert "eXIf" in indexed(tmp_path / "x.png", bytes(broken))
    assert decode(bytes(broken), "x").shape[:2] == (RGB.shape[1], RGB.shape[0])


def test_variants_are_named():
    data = several()
    with pytest.raises(DataError, match="Apple's variant of PNG"):
        decode(data[:8] + chunk(b"CgBI", bytes(4)) + data[8:], "x")
    with pytest.raises(DataError, match="unknown PNG chunk ABCD"):
        decode(data[:33] + chunk(b"ABCD", b"") + data[33:], "x")
    with pytest.raises(DataError, match="checksum of its IDAT chunk is wrong"):
        decode(data[:-16] + bytes([data[-16] ^ 1]) + data[-15:], "x")
