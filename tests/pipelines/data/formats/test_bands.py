"""Channels other than red, green and blue: every band of a file arrives as it was written, or one line refuses it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.dataset import load_dataset
from pipelines.data.decode import decode, examine, from_pil
from pipelines.data.decoding import Decoding
from pipelines.data.headers import inspect_header
from pipelines.errors import DataError
from tests.tiff_writer import tiff

HEIGHT, WIDTH = 9, 15
EXTRA_SAMPLES, UNSPECIFIED, ALPHA = 338, 0, 2


def values(bands: int, dtype: type = np.uint8) -> np.ndarray:
    """(HEIGHT, WIDTH, bands), different in every pixel and band."""
    rng = np.random.default_rng(bands)
    return rng.integers(0, np.iinfo(dtype).max + 1, (HEIGHT, WIDTH, bands)).astype(dtype)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def read(data: bytes, channels: int, **choices) -> np.ndarray:
    return decode(data, "x", Decoding(channels=channels, **choices))


def refusal(data: bytes, channels: int) -> str:
    with pytest.raises(DataError) as caught:
        read(data, channels)
    return str(caught.value)


@pytest.mark.parametrize("bands", [1, 2, 4, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", [False, True])
def test_bands_of_a_tiff_and_of_arrays(bands: int, dtype: type, planar: bool):
    written = values(bands, dtype)
    expected = written if dtype is np.uint8 else (written >> 8).astype(np.uint8)
    extra = {EXTRA_SAMPLES: (3, (UNSPECIFIED,))} if bands > 1 else {}
    stored = [tiff(written, 1, planar=planar, compression="deflate", tags=extra)]
    stored += [npy(written.transpose(2, 0, 1) if planar else written), npy(np.asfortranarray(written))]
    for data in stored:
        np.testing.assert_array_equal(read(data, bands), expected)


def test_a_tiff_of_rgb_has_its_fourth_band_only_where_it_is_asked_for():
    written = values(4)
    for kind in (UNSPECIFIED, ALPHA):
        data = tiff(written, 2, tags={EXTRA_SAMPLES: (3, (kind,))})
        np.testing.assert_array_equal(read(data, 4), written)
        np.testing.assert_array_equal(read(data, 3), written[..., :3])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_a_channel(kind: str):
    written = values(4)
    np.testing.assert_array_equal(read(saved(Image.fromarray(written, "RGBA"), kind), 4), written)
    if kind == "PNG":
        np.testing.assert_array_equal(read(saved(Image.fromarray(written[..., :2], "LA"), kind), 2), written[..., :2])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_one_channel_is_grey_as_pillow_converts_it(kind: str):
    data = saved(Image.fromarray(values(3), "RGB"), kind)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("L"))
        np.testing.assert_array_equal(from_pil(image, 1)[..., 0], expected)
    np.testing.assert_array_equal(read(data, 1)[..., 0], expected)
    grey = saved(Image.fromarray(values(1)[..., 0], "L"), kind)
    np.testing.assert_array_equal(read(grey, 1), read(grey, 3)[..., :1])


def test_a_value_range_is_that_of_every_band():
    written = values(5, np.uint16) >> 4
    for data in (tiff(written, 1, tags={EXTRA_SAMPLES: (3, (UNSPECIFIED,))}), npy(written)):
        expected = np.rint(written / 4095 * 255).astype(np.uint8)
        np.testing.assert_array_equal(read(data, 5, value_range=(0, 4095)), expected)
    floats = np.linspace(-1, 1, HEIGHT * WIDTH * 5, dtype=np.float32).reshape(HEIGHT, WIDTH, 5)
    assert "32-bit floats (-1 to 1), for which white is undefined" in refusal(npy(floats), 5)
    decoded = read(npy(floats), 5, value_range=(-1, 1))
    assert np.abs(decoded - (floats + 1) / 2 * 255).max() <= 0.51


def test_arrays_of_grey_and_rgb_are_as_from_other_formats():
    grey, colour = values(1), values(3)
    for array in (grey, grey[..., 0], grey.transpose(2, 0, 1)):
        np.testing.assert_array_equal(read(npy(array), 3), np.repeat(grey, 3, axis=2))
    for array in (colour, colour.transpose(2, 0, 1)):
        np.testing.assert_array_equal(read(npy(array), 3), colour)
    np.testing.assert_array_equal(read(npy(grey[..., 0] > 99), 1), 255 * (grey > 99).astype(np.uint8))
    assert examine(npy(colour.transpose(2, 0, 1)), "x").kind == "NPY CHW;uint8"
    wide = values(4)[:4]  # four rows and four bands: the last axis is that of the channels
    np.testing.assert_array_equal(read(npy(wide), 4), wide)


def test_other_numbers_of_bands_are_refused_with_the_flag():
    assert "it has 2 bands, and 3 are expected: give --channels 2" in refusal(npy(values(2)), 3)
    assert "give --channels 13" in refusal(tiff(values(13), 1), 3)
    assert "it has 13 bands, and 4 are expected" in refusal(tiff(values(13), 1), 4)
    assert "it has 3 bands, and 4 are expected" in refusal(saved(Image.fromarray(values(3), "RGB"), "PNG"), 4)
    assert "it has 1 band, and 4 are expected" in refusal(saved(Image.fromarray(values(1)[..., 0], "L"), "JPEG"), 4)
    with pytest.raises(ValueError, match="bands R, G, B, expected 4"):
        from_pil(Image.fromarray(values(3), "RGB"), 4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(values(4))[:-1], "truncated: it has 539 of 540 bytes"),
        (npy(values(4))[:40], "header is truncated or damaged"),
        (b"\x93NUMPY\3\0" + npy(values(4))[8:], "in version"),
        (npy(np.array([{}])), "array of object"),
        (npy(np.zeros((2, 3, 4, 5), np.uint8)), "array of shape"),
        (npy(np.zeros((0, 3), np.uint8)), "array of shape"),
        (npy(np.zeros((3, 4), np.complex64)), "array of complex64"),
    ],
)
def test_arrays_that_are_no_images(data: bytes, reason: str):
    assert reason in refusal(data, 4)


def test_headers_have_the_sizes_of_the_images(tmp_path: Path):
    for name, array in (("hwc", values(4)), ("chw", values(4, np.uint16).transpose(2, 0, 1))):
        np.save(tmp_path / f"{name}.npy", array)
        header = inspect_header(str(tmp_path / f"{name}.npy"), Decoding(channels=4))
        assert (header.size, header.deep) == ((HEIGHT, WIDTH), name == "chw")
    (tmp_path / "cut.npy").write_bytes(npy(values(4))[:-1])
    with pytest.raises(DataError, match="truncated"):
        inspect_header(str(tmp_path / "cut.npy"), Decoding(channels=4))


def write_mixture(folder: Path) -> None:
    for i in range(3):
        np.save(folder / f"four-{i}.npy", values(4))
    np.save(folder / "two.npy", values(2))


def test_a_mixture_is_one_line_with_counts_and_files(tmp_path: Path):
    write_mixture(tmp_path)
    with pytest.raises(DataError) as caught:
        load_dataset(str(tmp_path), data_root=tmp_path, decoding=Decoding(channels=4))
    assert "different numbers of bands: 3 have 4 bands (four-0.npy), 1 has 2 bands (two.npy)" in str(caught.value)
    (tmp_path / "two.npy").unlink()
    with pytest.raises(DataError, match="have 4 bands, and --channels is 3: give --channels 4"):
        load_dataset(str(tmp_path), data_root=tmp_path)
    train = load_dataset(str(tmp_path), data_root=tmp_path, decoding=Decoding(channels=4)).train
    assert (len(train), train.channels, train.read(0).shape) == (3, 4, (HEIGHT, WIDTH, 4))


def test_arrays_are_images_only_where_there_are_no_others(tmp_path: Path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "1.npy", values(3))
    arrays = load_dataset(str(tmp_path), data_root=tmp_path)
    assert arrays.train.class_names == ("cats", "dogs")
    Image.fromarray(values(3), "RGB").save(tmp_path / "cats" / "2.png")
    images = load_dataset(str(tmp_path), data_root=tmp_path)
    assert [Path(path).name for path in images.train.paths or ()] == ["2.png"]
    assert images.choices.others[".npy"] == 1  # beside it; the folder of arrays alone is not entered
