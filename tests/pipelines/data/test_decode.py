"""Decoding: odd files decode to the expected pixels, bad ones are refused with a reason."""

import io
import os
import re
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipelines.data.decode import decode, printable
from pipelines.data.formats.common import MAX_PIXELS
from pipelines.data.headers import read_header, read_headers
from pipelines.errors import DataError
from tests.oddities import BadFile, GoodFile, bad_files, encode, exif, good_files, picture, png, stored_as, write_files

GOOD, BAD = good_files(), bad_files()


@pytest.mark.parametrize("file", GOOD, ids=lambda file: ascii(file.name))
def test_an_odd_file_decodes_to_its_pixels(file: GoodFile):
    pixels = decode(file.data, file.name)
    assert pixels.dtype == np.uint8
    assert pixels.shape == file.pixels.shape
    assert pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - file.pixels).mean() <= file.tolerance


PLAIN = [file for file in GOOD if "grey16" not in file.name and not file.name.startswith("faulty")]


@pytest.mark.parametrize("file", PLAIN, ids=lambda file: ascii(file.name))
def test_pillow_agrees(file: GoodFile):
    """Pillow's conversion gives the same pixels, except for 16-bit grey, which it clips, and what it refuses."""
    with warnings.catch_warnings(), Image.open(io.BytesIO(file.data)) as image:
        warnings.simplefilter("ignore")  # Pillow warns about transparent palettes and broken EXIF
        pillow = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode(file.data, file.name), pillow)


@pytest.mark.parametrize("file", BAD, ids=lambda file: file.name)
def test_a_bad_file_is_refused(file: BadFile):
    with pytest.raises(DataError, match=f"{re.escape(file.name)} is not a usable image: .*({file.reason})") as caught:
        decode(file.data, file.name)
    assert "\n" not in str(caught.value)


def test_headers_agree_with_decoding(tmp_path):
    """Sizes from headers equal decoded sizes, and indexing detects the bad files it must detect."""
    good, bad = write_files(tmp_path / "good", GOOD), write_files(tmp_path / "bad", BAD)
    sizes, reasons = read_headers([str(path) for path in good + bad])
    np.testing.assert_array_equal(sizes[: len(good)], [file.pixels.shape[:2] for file in GOOD])
    detected = {i - len(good) for i, _ in reasons}
    assert detected == {i for i, file in enumerate(BAD) if file.in_header}
    for i, reason in reasons:
        assert re.search(BAD[i - len(good)].reason, reason)


def test_a_bomb_is_refused_before_decoding(tmp_path):
    (path,) = write_files(tmp_path, [file for file in BAD if file.name == "bomb.png"])
    assert path.stat().st_size < 60_000
    tracemalloc.start()
    with pytest.raises(DataError, match="pixels"):
        read_header(str(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_the_limit_counts_pixels_not_sides(tmp_path):
    """A strip of 60,000 × 100 is accepted."""
    strip = np.zeros((100, 60_000), dtype=np.uint8)
    assert strip.size < MAX_PIXELS
    path = tmp_path / "strip.png"
    path.write_bytes(encode(strip, "PNG"))
    assert read_header(str(path)) == (100, 60_000)


@pytest.mark.parametrize("name", ["missing.jpg", "folder.jpg", "pipe.jpg"])
def test_a_path_that_is_no_file_is_refused_without_waiting(tmp_path, name):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match=name):
        read_header(str(tmp_path / name))


def test_sixteen_bits_keep_their_high_byte():
    """All 16-bit values, in grey and colour PNG: value >> 8."""
    values = np.arange(65_536, dtype=np.uint16).reshape(256, 256, 1)
    expected = np.repeat(values >> 8, 3, axis=2).astype(np.uint8)
    np.testing.assert_array_equal(decode(png(values, 16, 0), "grey"), expected)
    np.testing.assert_array_equal(decode(png(np.repeat(values, 3, axis=2), 16, 2), "colour"), expected)


def test_orientation_is_undone_exactly():
    """All eight EXIF orientations, stored losslessly, are decoded upright."""
    upright = picture(7, 5)
    for orientation in range(1, 9):
        stored = encode(stored_as(upright, orientation), "PNG", exif=exif(orientation))
        np.testing.assert_array_equal(decode(stored, f"orientation {orientation}"), upright)


def test_names_cannot_send_escapes_to_the_terminal():
    message = printable("a\x1b[31m\u202eb\ncaf\udce9 桜")
    assert message == "a\\x1b[31m\\u202eb\\ncaf\\udce9 桜"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.data())
def test_damage_is_an_image_or_a_data_error(which, data):
    """A file truncated and overwritten anywhere is decoded or refused; no other exception, no warning."""
    encoded = bytearray(GOOD[which].data)
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    encoded = bytes(encoded[: data.draw(st.integers(0, len(encoded)))])
    try:
        pixels = decode(encoded, "damaged")
    except DataError:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


def test_jpeg_without_torchvision_is_the_same(monkeypatch):
    """The operator that torchvision will remove affects speed only."""
    files = [file for file in GOOD if file.name.lower().endswith((".jpg", ".jpeg"))]
    fast = [decode(file.data, file.name) for file in files]
    monkeypatch.delattr(torch.ops.image, "decode_jpeg")
    monkeypatch.setattr(type(torch.ops.image), "__getattr__", object.__getattribute__)
    assert not hasattr(torch.ops.image, "decode_jpeg")
    for file, pixels in zip(files, fast, strict=True):
        np.testing.assert_array_equal(decode(file.data, file.name), pixels)


def test_photographs_agree_with_pillow(test_data):
    paths = sorted((test_data / "imagenet-60").glob("*.JPEG"))[:20]
    assert paths
    for path in paths:
        with Image.open(path) as image:
            pillow = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        ours = decode(path.read_bytes(), path.name)
        assert read_header(str(path)) == ours.shape[:2]
        np.testing.assert_array_equal(ours, pillow)
