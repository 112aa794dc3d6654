"""plain_jpeg: never accepts a JPEG that is truncated, unusual, or of a different size from its header."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.data.decode import decode
from pipelines.data.formats.common import upright
from pipelines.data.plain_jpeg import PlainJpeg, plain_jpeg, stored_box
from pipelines.errors import DataError
from tests.oddities import bad_files, encode, exif, good_files, picture

RGB = picture(30, 50)
ODD = {"cmyk.jpeg", "gif-inside.jpg", "png-inside.jpg", "junk-behind.jpg"}


def test_common_jpegs_are_plain():
    for options in ({}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 100}):
        assert plain_jpeg(encode(RGB, "JPEG", **options)) == PlainJpeg(30, 50, 1)
    assert plain_jpeg(encode(RGB[..., 0], "JPEG")) == PlainJpeg(30, 50, 1)
    assert plain_jpeg(encode(RGB, "JPEG", exif=exif(6))) == PlainJpeg(30, 50, 6)


@pytest.mark.parametrize("file", good_files(), ids=lambda file: ascii(file.name))
def test_odd_files_are_classified(file):
    header = plain_jpeg(file.data)
    named = file.name.lower().endswith((".jpg", ".jpeg"))
    is_plain = named and file.name not in ODD and not file.name.startswith("faulty")
    assert (header is not None) == is_plain
    assert header is None or header.upright_size == file.pixels.shape[:2]


@pytest.mark.parametrize("file", [f for f in bad_files() if f.name != "claim.jpg"], ids=lambda file: file.name)
def test_bad_files_are_not_plain(file):
    assert plain_jpeg(file.data) is None


def test_colours_that_are_not_ycbcr_are_not_plain():
    """Adobe's marker with transform 0 means RGB; so do components with ids R, G and B."""
    data = encode(RGB, "JPEG", subsampling=0)
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    assert plain_jpeg(data[:2] + adobe + b"\x01" + data[2:]) is not None
    assert plain_jpeg(data[:2] + adobe + b"\x00" + data[2:]) is None
    frame = data.index(b"\xff\xc0")
    named = bytearray(data)
    named[frame + 10], named[frame + 13], named[frame + 16] = b"RGB"
    assert plain_jpeg(bytes(named)) is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": exif(3)}], ids=["baseline", "scans", "exif"])
def test_no_truncated_file_is_plain(options):
    data = encode(RGB, "JPEG", **options)
    assert plain_jpeg(data) is not None
    assert all(plain_jpeg(data[:length]) is None for length in range(len(data)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4), st.integers(1, 8))
def test_the_size_of_a_damaged_file_equals_its_decoded_size(damage, orientation):
    data = bytearray(encode(RGB, "JPEG", exif=exif(orientation)))
    for offset, value in damage:
        data[offset % len(data)] = value
    header = plain_jpeg(bytes(data))
    if header is None or header.height * header.width > 100_000:
        return
    try:
        pixels = decode(bytes(data), "damaged")
    except DataError:
        return
    assert pixels.shape[:2] == header.upright_size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_stored_box_is_the_upright_box(orientation):
    stored = picture(9, 14)
    image = upright(stored, orientation)
    header = PlainJpeg(9, 14, orientation)
    assert header.upright_size == image.shape[:2]
    boxes = np.array([[0, 0, *image.shape[:2]], [2, 1, 3, 5], [6, 6, 1, 2]], dtype=np.int32)
    for (top, left, height, width), (t, l, h, w) in zip(boxes, stored_box(boxes, header), strict=True):  # noqa: E741
        expected = image[top : top + height, left : left + width]
        np.testing.assert_array_equal(upright(stored[t : t + h, l : l + w], orientation), expected)


def test_broken_exif_is_upright():
    data = encode(RGB, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fjunk")
    assert plain_jpeg(data) == PlainJpeg(30, 50, 1)
    assert plain_jpeg(encode(Image.fromarray(RGB).convert("CMYK"), "JPEG")) is None
