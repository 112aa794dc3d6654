"""More than 8 bits: value ranges, the low bytes of every format, and the hint when most of a range is unused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastmoco.cli import main
from fastmoco.config import RunConfig
from fastmoco.errors import ConfigError, ExitCode
from fastmoco.evaluation.cache import images_hash
from pipelines.data.dataset import load_dataset
from pipelines.data.decode import decode, examine
from pipelines.data.decoding import Decoding
from pipelines.data.formats.deep import Deep, Span, joined
from pipelines.data.notes import decoding_lines, span_line
from pipelines.errors import DataError
from tests.oddities import encode, picture, png
from tests.tiff_writer import tiff

RGB = picture(20, 30)
TWELVE = RGB.astype(np.uint16) * 16 + 3


@pytest.mark.parametrize(
    ("name", "data", "grey"),
    [
        ("grey.png", png(TWELVE[..., :1], 16, 0), True),
        ("grey-alpha.png", png(np.concatenate([TWELVE[..., :1], 65535 - TWELVE[..., :1]], axis=2), 16, 4), True),
        ("rgb.png", png(TWELVE, 16, 2), False),
        ("rgba.png", png(np.concatenate([TWELVE, 65535 - TWELVE[..., :1]], axis=2), 16, 6), False),
        ("grey.pgm", b"P5\n30 20\n# comment\n4095\n" + TWELVE[..., 0].astype(">u2").tobytes(), True),
        ("rgb.ppm", b"P6 30 20 65535\n" + TWELVE.astype(">u2").tobytes(), False),
        ("ascii.ppm", b"P3 30 20 4095\n" + " ".join(map(str, TWELVE.reshape(-1))).encode(), False),
        ("ascii.pgm", b"P2 30 20 4095 " + " ".join(map(str, TWELVE[..., 0].reshape(-1))).encode(), True),
        ("signed.tif", tiff(TWELVE.astype(np.int16), 2), False),
        ("float.tif", tiff(TWELVE.astype(np.float32), 2, compression="lzw"), False),
        ("grey.tif", tiff(TWELVE[..., :1], 1), True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_bits_of_every_format_are_read(name: str, data: bytes, grey: bool):
    """A value range of 256 values shows each of them: none is lost to the high byte first."""
    want = np.repeat(TWELVE[..., :1], 3, axis=2) if grey else TWELVE
    for low in (0, 1000, 3840):
        pixels = decode(data, name, Decoding(value_range=(low, low + 255)))
        np.testing.assert_array_equal(pixels, want.astype(int).clip(low, low + 255) - low)
    span = examine(data, name, Decoding(value_range=(0, 4095))).span
    assert span is not None
    assert (span.least, span.most) == (want.min(), want.max())


def test_images_of_8_bits_do_not_change():
    for kind in ("PNG", "BMP", "TIFF", "JPEG", "PPM", "GIF"):
        data = encode(RGB, kind)
        np.testing.assert_array_equal(decode(data, "x", Decoding(value_range=(0, 10))), decode(data, "x"))


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("value_range", [(0, 4095), (-1000, 3000), (0.25, 0.75), (17, 18)])
def test_the_mapping_is_linear_rounded_and_clipped(kind: type, value_range: tuple[float, float]):
    low, high = value_range
    values = np.linspace(low - (high - low), high + (high - low), 3001)
    values = np.maximum(values, 0 if kind in (np.uint16, np.uint32) else -np.inf).astype(kind).reshape(1, -1)
    got = Deep(values, white=None).rgb(value_range)
    exact = ((values.astype(np.float64) - low) * 255 / (high - low)).clip(0, 255)
    assert (np.abs(got[0] - exact[0, :, None]) <= 0.5 + 1e-9).all()
    inverted = Deep(values, white=None, inverted=True).rgb(value_range)
    np.testing.assert_array_equal(inverted, 255 - got)


def test_values_that_are_no_numbers():
    values = np.array([[np.nan, np.inf, -np.inf, 0.5]], dtype=np.float32)
    assert Deep(values, white=None).rgb((0, 1))[0, :, 0].tolist() == [0, 255, 0, 128]
    assert Deep(values, white=None).span() == Span(0.5, 0.5, 0.5, 0.5, None, False)
    assert Deep(values[:, :3], white=None).span() == Span(0, 0, 0, 0, None, False)
    with pytest.raises(DataError, match=r"32-bit floats .*--value-range"):
        decode(tiff(values[..., None], 1), "x")


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        (np.arange(4096, dtype=np.uint16), "--value-range 0 4095"),
        (np.arange(3, 900, dtype=np.uint16), "--value-range 0 1023"),
        (np.arange(16_000, dtype=np.uint16), "--value-range 0 16383"),
        (np.arange(-1024, 3072, dtype=np.int16), "--value-range -1020 3067"),
        (np.arange(30_000, 34_001, dtype=np.uint16), "--value-range 30004 33996"),
        (np.full(9, 700, dtype=np.uint16), "--value-range 700 701"),
        (np.linspace(-0.5, 0.5, 1001, dtype=np.float32), "--value-range -0.499 0.499"),
        (np.zeros(5, dtype=np.float32), "--value-range 0 1"),
    ],
)
def test_the_range_that_is_offered(values: np.ndarray, flags: str):
    """The full bits of a sensor where the values begin near 0; else all but the outermost 0.1 % on each side."""
    deep = Deep(values.reshape(1, -1), 65_535 if values.dtype == np.uint16 else None)
    assert deep.span().flags() == flags
    line = span_line(deep.span(), None)
    assert line is not None
    assert line.endswith(flags)
    assert span_line(deep.span(), (0, 1)) is None


def test_a_range_that_is_used_needs_no_hint():
    bright = Deep(np.linspace(0, 60_000, 999).astype(np.uint16).reshape(1, -1), 65_535).span()
    dark = Deep(np.arange(999, dtype=np.uint16).reshape(1, -1), 65_535).span()
    assert span_line(bright, None) is None
    assert span_line(dark, None) is not None
    assert span_line(joined([dark, bright]), None) is None  # one bright image shows that all bits are meant
    assert span_line(joined([]), None) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12-bit images in files of 16 bits, and one of 8 bits."""
    (tmp_path / "f").mkdir()
    for i in range(3):
        (tmp_path / "f" / f"{i}.png").write_bytes(png(TWELVE + i, 16, 2))
        (tmp_path / "f" / f"{i}.tif").write_bytes(tiff(TWELVE - i, 2))
    (tmp_path / "f" / "8.png").write_bytes(encode(RGB, "PNG"))
    return tmp_path / "f"


def scan(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    arguments = ["scan", str(folder), "--workers", "0", "--data-root", str(folder.parent), *flags]
    code = main(arguments)
    output = capsys.readouterr()
    return code, output.out + output.err


def test_scan_and_load_offer_the_range(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Without a scan from a sample, with one from all files; not once it is given."""
    offered = ["--value-range 0 4095"]
    lines = decoding_lines(load_dataset(str(folder), data_root=folder.parent))
    assert [line[-len(offered[0]) :] for line in lines] == offered
    code, output = scan(folder, capsys)
    assert code == ExitCode.DONE
    assert "use a small part of their range, 1 to 4085 of 0 to 65,535" in " ".join(output.split())
    assert offered[0] in output
    scanned = load_dataset(str(folder), data_root=folder.parent)
    assert scanned.indexing == "as scanned"
    assert decoding_lines(scanned) == lines
    chosen = load_dataset(str(folder), data_root=folder.parent, decoding=Decoding(value_range=(0, 4095)))
    assert decoding_lines(chosen) == []
    assert chosen.train.read(0).mean() > 5 * scanned.train.read(0).mean()
    assert scan(folder, capsys, "--value-range", "0", "4095")[1].count("value-range") == 0


def test_a_scan_serves_another_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What is bad or good depends on the decoding: those files alone are opened again."""
    folder = tmp_path / "f"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.png").write_bytes(encode(RGB, "PNG"))
    (folder / "signed.tif").write_bytes(tiff(TWELVE.astype(np.int16), 2))
    (folder / "cut.jpg").write_bytes(encode(RGB, "JPEG")[:-100])
    code, output = scan(folder, capsys)
    assert code == ExitCode.DATA
    assert "2 of 11 images are bad" in output
    assert "no white of their own: use --value-range" in " ".join(output.split())
    both = Decoding(value_range=(0, 4095), truncated="accept")
    dataset = load_dataset(str(folder), data_root=tmp_path, decoding=both)
    assert len(dataset.train) == 11
    assert dataset.indexing == "as scanned"
    assert [path for path, _ in dataset.tolerated] == [str(folder / "cut.jpg")]
    assert "1 image has missing pixels" in decoding_lines(dataset)[0]
    assert scan(folder, capsys, "--value-range", "0", "4095", "--truncated", "accept")[0] == ExitCode.DONE
    assert load_dataset(str(folder), data_root=tmp_path, decoding=both).indexing == "as scanned"
    with pytest.raises(DataError, match="2 of 11 images"):
        load_dataset(str(folder), data_root=tmp_path)


def test_the_flags_are_settings_of_a_run():
    config = RunConfig().replace(value_range=(0, 4095), truncated="accept")
    assert config.data.value_range == (0.0, 4095.0)
    assert RunConfig.from_json(config.to_json()) == config
    old = json.loads(config.to_json())
    del old["data"]["value_range"], old["data"]["truncated"]
    assert RunConfig.from_json(json.dumps(old)).data.value_range is None
    for wrong in ((5, 5), (7, 1), (0, float("inf")), (float("nan"), 1)):
        with pytest.raises(ConfigError, match="--value-range"):
            RunConfig().replace(value_range=wrong)


def test_cached_features_depend_on_the_decoding(folder: Path):
    """Features of other pixels are not taken from the cache."""
    hashes = {
        images_hash(load_dataset(str(folder), data_root=folder.parent, decoding=decoding).train)
        for decoding in (Decoding(), Decoding((0, 4095)), Decoding((0, 1000)), Decoding(truncated="accept"))
    }
    assert len(hashes) == 4
