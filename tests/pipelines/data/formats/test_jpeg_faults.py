"""JPEGs: whole without their end marker, refused when blocks are missing, indifferent to their metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.decode import decode, examine
from pipelines.data.decoding import Decoding
from pipelines.data.formats.common import TRUNCATED
from pipelines.data.formats.jpeg import DISORDERLY, END, NO_END
from pipelines.data.headers import inspect_header
from pipelines.errors import DataError
from tests.oddities import encode, exif, picture

NOISE = np.random.Generator(np.random.Philox(2)).integers(0, 256, (33, 41, 3), np.uint8)
HALF_WHITE = np.where(np.arange(40)[:, None, None] < 20, picture(40, 24), 255).astype(np.uint8)
KINDS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "noise": (NOISE, {}),
    "full colour": (NOISE, {"quality": 95, "subsampling": 0}),
    "progressive": (picture(25, 33), {"progressive": True, "quality": 95}),
    "restarts": (HALF_WHITE, {"restart_marker_blocks": 1}),
    "progressive with restarts": (HALF_WHITE, {"restart_marker_blocks": 2, "progressive": True}),
    "white": (HALF_WHITE[20:], {"optimize": True}),
    "one pixel": (HALF_WHITE[:1, :1], {}),
}


def jpeg(kind: str, mode: str = "RGB") -> bytes:
    pixels, options = KINDS[kind]
    data = encode(Image.fromarray(pixels).convert(mode), "JPEG", **options)
    assert data.endswith(END)
    return data


def agrees_with_its_header(path: Path, data: bytes, decoding: Decoding | None = None) -> np.ndarray | None:
    """The pixels of `data`, None if it is refused; indexing must say the same of the file."""
    path.write_bytes(data)
    decoding = decoding or Decoding()
    try:
        pixels = decode(data, "x.jpg", decoding)
    except DataError:
        with pytest.raises(DataError):
            inspect_header(str(path), decoding)
        return None
    assert inspect_header(str(path), decoding).size == pixels.shape[:2]
    return pixels


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_is_refused_or_harmless(kind: str, mode: str, tmp_path: Path):
    """Without its end marker a JPEG is itself. Cut anywhere before, it is refused, or no pixel needs the rest."""
    data = jpeg(kind, mode)
    whole = decode(data, "whole")
    for missing in (1, 2):
        end = examine(data[:-missing], "x")
        np.testing.assert_array_equal(end.pixels, whole)
        assert end.tolerated == NO_END
        assert inspect_header(_written(tmp_path / "end.jpg", data[:-missing])).tolerated == NO_END
    refused = 0
    for length in [*range(len(data) - 60, len(data) - 2), *range(3, len(data) - 60, 23)]:
        pixels = agrees_with_its_header(tmp_path / "x.jpg", data[:length])
        refused += pixels is None
        assert pixels is None or np.array_equal(pixels, whole), length
    assert refused > 50


def _written(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("padding", [bytes(3000), b"\xff" * 3000, b"\xff", b"\xff\x00" + bytes(100)], ids=len)
def test_space_that_was_never_filled_is_no_image_data(padding: bytes):
    """A download into allocated space ends in zeros: they would decode to blocks."""
    data = jpeg("noise")
    for length in range(len(data) - 300, len(data) - 3, 7):
        with pytest.raises(DataError, match="truncated"):
            decode(data[:length] + padding, "x")


def test_the_end_of_a_thumbnail_is_not_the_end(tmp_path: Path):
    """A JPEG cut behind a preview in its EXIF data, which is a JPEG with an end marker of its own."""
    tags = exif(1)
    data = encode(picture(40, 56), "JPEG", exif=tags.tobytes() + jpeg("white") + bytes(100))
    assert END in data[:-500]
    for length in (len(data) - 300, len(data) - 100):
        assert agrees_with_its_header(tmp_path / "x.jpg", data[:length]) is None


def test_accepted_truncation_keeps_what_is_there(tmp_path: Path):
    """The rows before the cut are as they were; the rest is grey. It is named."""
    rgb = picture(64, 48)
    data, accept = encode(rgb, "JPEG", quality=95, restart_marker_rows=1), Decoding(truncated="accept")
    whole = decode(data, "x")
    cut = data[: len(data) * 3 // 4]
    assert agrees_with_its_header(tmp_path / "x.jpg", cut) is None
    pixels = agrees_with_its_header(tmp_path / "x.jpg", cut, accept)
    assert pixels is not None
    np.testing.assert_array_equal(pixels[:16], whole[:16])
    assert (pixels[-8:] == 128).all()
    assert examine(cut, "x", accept).tolerated == TRUNCATED
    assert examine(data, "x", accept).tolerated == ""
    with pytest.raises(DataError, match="header is not complete"):
        decode(data[:300], "x", accept)


def test_bytes_between_segments_and_damaged_metadata(tmp_path: Path):
    """Stray bytes, broken EXIF, profiles and maker notes: the pixels are those of the clean file."""
    rgb = picture(40, 56)
    clean = encode(rgb, "JPEG", quality=95)
    whole, tables = decode(clean, "x"), clean.index(b"\xff\xdb")
    for content, fault in [
        (b"\x00\x01\x02", DISORDERLY),
        (b"\xff\xff\xff", ""),  # fill bytes are allowed
        (b"\xff\xe1\x00\x10Exif\0\0garbage!", "damaged EXIF data"),
        (b"\xff\xe1\x00\x1aExif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0", "damaged EXIF data"),
        (b"\xff\xe2\x00\x12ICC_PROFILE\0\x09\x01xx", ""),
        (b"\xff\xe2\x00\x08MPF\0xx", ""),
        (b"\xff\xed\x00\x20Photoshop 3.0\x008BIM\xff\xff" + bytes(10), ""),
        (b"\xff\xfe\x00\x04\xd9\xff", ""),
    ]:
        data = clean[:tables] + content + clean[tables:]
        for mode in (data, data[:-2]):
            np.testing.assert_array_equal(agrees_with_its_header(tmp_path / "x.jpg", mode), whole)
        assert examine(data, "x").tolerated == fault


@pytest.mark.parametrize("mode", ["CMYK", "RGB"])
def test_pillow_reads_what_it_refuses_once_it_is_clean(mode: str):
    """CMYK is decoded by Pillow, which would refuse stray bytes between segments."""
    clean = encode(Image.fromarray(picture(40, 56)).convert(mode), "JPEG", quality=95)
    tables = clean.index(b"\xff\xdb")
    data = clean[:tables] + b"\0\1\2" + clean[tables:-2] + END + b"behind"
    np.testing.assert_array_equal(decode(data, "x"), decode(clean, "x"))


def test_kinds_that_are_not_supported_are_named():
    data = jpeg("noise")
    frame = data.index(b"\xff\xc0")
    for position, value, words in [
        (4, 12, "JPEG of 12 bits per channel"),
        (9, 2, "JPEG of 2 channels"),
        (9, 5, "JPEG of 5 channels"),
    ]:
        changed = bytearray(data)
        changed[frame + position] = value
        with pytest.raises(DataError, match=words):
            decode(bytes(changed), "x")
    with pytest.raises(DataError, match="0 pixels"):
        decode(data[: frame + 5] + bytes(4) + data[frame + 9 :], "x")
    with pytest.raises(DataError, match="without image data"):
        decode(data[:2] + END + bytes(4), "x")
