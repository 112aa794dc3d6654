"""TIFFs of every layout decode to the right pixels or are refused in one line, never to wrong pixels."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from pipelines.data.decode import decode
from pipelines.data.decoding import Decoding
from pipelines.errors import DataError
from tests.oddities import encode, picture, stored_as
from tests.tiff_writer import COMPRESSIONS, tiff

HEIGHT, WIDTH = 37, 50  # neither a multiple of a tile nor of 8
GREY, RGB = 1, 2
STORAGE = [{}, {"rows_per_strip": 5}, {"tile": (16, 16)}, {"tile": (16, 32), "order": ">"}, {"order": ">", "big": True}]


def colours(count: int = 3) -> np.ndarray:
    """(h, w, count) uint8: every band is another."""
    rgb = picture(HEIGHT, WIDTH)
    return np.concatenate([rgb, 255 - rgb, rgb[::-1]], axis=2)[..., :count]


def deep_values(count: int = 3) -> np.ndarray:
    """uint16 whose high bytes are `colours` and whose low bytes are arbitrary."""
    low = np.random.Generator(np.random.Philox(3)).integers(0, 256, (HEIGHT, WIDTH, count))
    return (colours(count).astype(np.uint16) << 8) | low.astype(np.uint16)


def as_grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., :1], 3, axis=2)


def is_refused(data: bytes, *words: str) -> bool:
    with pytest.raises(DataError) as caught:
        decode(data, "x.tif")
    message = str(caught.value)
    assert message.startswith("x.tif is not a usable image: ")
    assert message.isprintable()
    assert "none of" not in message
    return all(word in message for word in words)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("planar", [False, True], ids=["chunky", "planar"])
def test_bands_of_8_and_16_bits(storage: dict, compression: str, planar: bool):
    """Grey, RGB and three bands, all with alpha too: exactly their colours. Other numbers of bands are refused."""
    for predictor, count in itertools.product((1, 2), (1, 2, 3, 4, 5, 7)):
        if predictor == 2 and compression in ("none", "packbits"):
            continue
        options = {"compression": compression, "planar": planar, "predictor": predictor, **storage}
        for values in (colours(count), deep_values(count)):
            extra = {338: (3, [0] * (count - 1))} if count > 1 else {}
            data = tiff(values, GREY, tags=extra, **options)
            if count in (1, 3):
                expected = colours(3) if count == 3 else as_grey(colours(1))
                np.testing.assert_array_equal(decode(data, "bands"), expected)
            else:
                assert is_refused(data, f"a TIFF of {count} bands")
            if count in (2, 4):
                alpha = {338: (3, [*[0] * (count - 2), 2])}
                expected = colours(3) if count == 4 else as_grey(colours(1))
                np.testing.assert_array_equal(decode(tiff(values, GREY, tags=alpha, **options), "alpha"), expected)
            if count >= 3:
                for kind in (0, 1, 2) if count > 3 else (None,):
                    tags = {} if kind is None else {338: (3, [kind] + [0] * (count - 4))}
                    np.testing.assert_array_equal(decode(tiff(values, RGB, tags=tags, **options), "RGB"), colours(3))
            else:
                assert is_refused(tiff(values, RGB, **options), "RGB", f"of {count} channel")


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("storage", [{}, {"compression": "lzw", "rows_per_strip": 4}, {"tile": (16, 16)}], ids=str)
@pytest.mark.parametrize("planar", [False, True], ids=["chunky", "planar"])
def test_any_number_of_bits(bits: int, storage: dict, planar: bool):
    """White is the largest value of so many bits; above 8 bits the high byte counts; 0 may be white."""
    white = 2**bits - 1
    values = (colours(3).astype(np.int64) * white // 255).astype(np.uint8 if bits <= 8 else np.uint16)
    expected = np.rint(values.astype(float) * 255 / white) if bits <= 8 else values >> (bits - 8)
    np.testing.assert_array_equal(decode(tiff(values, RGB, bits=bits, planar=planar, **storage), "RGB"), expected)
    grey = tiff(values[..., :1], GREY, bits=bits, **storage)
    np.testing.assert_array_equal(decode(grey, "grey"), as_grey(expected))
    negative = tiff(values[..., :1], 0, bits=bits, **storage)
    np.testing.assert_array_equal(decode(negative, "WhiteIsZero"), 255 - as_grey(expected))


TYPES = ["int8", "int16", "int32", "int64", "uint32", "uint64", "float16", "float32", "float64"]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("options", [{}, {"order": ">"}, {"compression": "deflate", "tile": (16, 16)}], ids=str)
def test_types_without_a_white(kind: str, options: dict):
    """Refused with their own range; with a value range mapped linearly, also from planes and as WhiteIsZero."""
    values = np.maximum(colours(3) / 2 - 20, 0 if kind[0] == "u" else -np.inf).astype(kind)
    for planar in (False, True):
        data = tiff(values, RGB, planar=planar, **options)
        name = {"i": "signed integers", "u": "integers", "f": "floats"}[values.dtype.kind]
        assert is_refused(data, f"{8 * values.itemsize}-bit {name}", "white is undefined", "--value-range")
        mapped = decode(data, "x", Decoding(value_range=(-20, 100)))
        exact = (values.astype(np.float64) + 20) * 255 / 120
        assert np.abs(mapped - exact.clip(0, 255)).max() <= 0.5
    negative = decode(tiff(values[..., :1], 0, **options), "x", Decoding(value_range=(-20, 100)))
    assert np.abs(255 - negative.astype(int) - as_grey(exact.clip(0, 255))).max() <= 0.5


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 32)])
def test_predictors_of_floats(order: str, tile: tuple[int, int] | None):
    values = (colours(3).astype(np.float32) / 7) ** 2
    want = decode(tiff(values, RGB, order=order, tile=tile), "x", Decoding(value_range=(0, 1300)))
    assert want.std() > 20
    for predictor, planar in itertools.product((2, 3), (False, True)):
        data = tiff(values, RGB, order=order, tile=tile, planar=planar, compression="deflate", predictor=predictor)
        np.testing.assert_array_equal(decode(data, "x", Decoding(value_range=(0, 1300))), want)


@pytest.mark.parametrize("compression", ["none", "lzw", "deflate", "packbits"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_reversed_bits(compression: str, bits: int):
    values = colours(1) >> (8 - bits)
    data = tiff(values, GREY, bits=bits, compression=compression, reversed_bits=True)
    np.testing.assert_array_equal(decode(data, "x"), decode(tiff(values, GREY, bits=bits), "x"))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [257, 1], ids=["16 bits", "8 bits"])
def test_palettes(bits: int, scale: int):
    """Colours of 16 bits, or of 8 bits as some writers store them."""
    table = np.random.Generator(np.random.Philox(1)).integers(0, 256, (2**bits, 3))
    table[0] = 255
    indices = colours(1) >> (8 - bits)
    tags = {320: (3, (table.T * scale).reshape(-1).tolist())}
    for data in (tiff(indices, 3, bits=bits, tags=tags), tiff(indices, 3, bits=bits, tags=tags, compression="lzw")):
        np.testing.assert_array_equal(decode(data, "x"), table[indices[..., 0]])
    assert is_refused(tiff(indices, 3, bits=bits), "palette")
    assert is_refused(tiff(indices, 3, bits=bits, tags={320: (3, [1] * 7)}), "palette")


def test_inks():
    """CMYK as Pillow converts it, in planes and of 16 bits too; other inks are refused."""
    cmyk = np.asarray(Image.fromarray(colours(3)).convert("CMYK"))
    cmyk = np.ascontiguousarray(np.concatenate([cmyk[..., :3], colours(4)[..., 3:]], axis=2))
    want = np.asarray(Image.fromarray(cmyk, "CMYK").convert("RGB"))
    for planar in (False, True):
        np.testing.assert_array_equal(decode(tiff(cmyk, 5, planar=planar), "x"), want)
        np.testing.assert_array_equal(decode(tiff(cmyk.astype(np.uint16) * 257, 5, planar=planar), "x"), want)
    assert is_refused(tiff(cmyk, 5, tags={332: (3, [2])}), "separated")
    assert is_refused(tiff(cmyk[..., :3], 5), "separated")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("planar", [False, True])
def test_orientation(orientation: int, planar: bool):
    stored = stored_as(colours(3), orientation)
    data = tiff(stored, RGB, planar=planar, tags={274: (3, [orientation])})
    np.testing.assert_array_equal(decode(data, "x"), colours(3))


@pytest.mark.parametrize(
    ("photometric", "count", "words"),
    [(8, 3, "CIELab"), (9, 3, "ICCLab"), (4, 1, "mask"), (32803, 1, "CFA"), (32845, 3, "LogLuv"), (77, 1, "77")],
)
def test_photometric_interpretations_that_are_refused(photometric: int, count: int, words: str):
    assert is_refused(tiff(colours(count), photometric), words, "convert it")


def test_what_is_refused_is_named():
    rgb = colours(3)
    assert is_refused(tiff(rgb, RGB, tags={258: (3, [8, 8, 16])}), "different bits")
    assert is_refused(tiff(rgb, RGB, tags={339: (3, [1, 1, 2])}), "different number formats")
    assert is_refused(tiff(rgb, RGB, tags={259: (3, [34887])}), "compression LERC")
    assert is_refused(tiff(rgb, RGB, tags={259: (3, [34712])}), "compression JPEG 2000")
    assert is_refused(tiff(rgb, RGB, tags={259: (3, [4242])}), "compression number 4242")
    assert is_refused(tiff(colours(1).astype(np.complex64), GREY), "complex")
    assert is_refused(tiff(deep_values(1), GREY, tags={50706: (1, [1, 4, 0, 0])}), "raw camera data")
    assert is_refused(tiff(rgb, RGB, tags={254: (4, [1]), 330: (4, [8])}), "raw camera data")
    assert is_refused(tiff(rgb, RGB, tags={256: (4, [100_000]), 257: (4, [100_000])}), "100000×100000 pixels")
    assert is_refused(tiff(rgb, RGB)[:2000], "truncated")
    assert is_refused(b"II*\0" + bytes(40), "directory")
    canon = bytearray(tiff(rgb, RGB))
    canon[8:10] = b"CR"
    assert is_refused(bytes(canon), "CR2")


def test_damaged_metadata_is_no_matter():
    """Tags that make no pixels may be of no type, point behind the file or be repeated."""
    tags = {305: (2, list(b"software\0")), 33432: (2, list(b"long enough for an offset\0")), 34665: (4, [2**31])}
    data = tiff(colours(3), RGB, tags=tags)
    entry = data.index((33432).to_bytes(2, "little") + b"\2\0")
    for damage in ((entry + 2, 99), (entry + 7, 255), (entry + 11, 255)):
        broken = bytearray(data)
        broken[damage[0]] = damage[1]
        np.testing.assert_array_equal(decode(bytes(broken), "x"), colours(3))


def test_what_pillow_writes():
    """Bilevel fax codes, JPEG in RGB and grey: as Pillow itself reads them."""
    bits = Image.fromarray(colours(1)[..., 0] > 100)
    for compression in ("group3", "group4", "tiff_ccitt", "packbits"):
        want = as_grey(np.asarray(bits).astype(np.uint8)[..., None] * 255)
        np.testing.assert_array_equal(decode(encode(bits, "TIFF", compression=compression), "x"), want)
    for image in (Image.fromarray(colours(3)), Image.fromarray(colours(1)[..., 0])):
        data = encode(image, "TIFF", compression="jpeg", quality=95)
        with Image.open(io.BytesIO(data)) as pillow:
            want = np.asarray(pillow.convert("RGB"))
        np.testing.assert_array_equal(decode(data, "x"), want)
        assert np.abs(want - (np.asarray(image.convert("RGB")).astype(int))).mean() < 4
