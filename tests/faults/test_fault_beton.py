"""Flipped bits in `.beton` files and their manifests, and images that a converter takes and a reader does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.backends.ffcv import FfcvCrops
from pipelines.backends.select import open_source
from pipelines.data import beton, record_digests
from pipelines.data.beton import read_index
from pipelines.data.beton_manifest import BetonManifest
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from pipelines.data.quarantine import Ledger
from pipelines.errors import DataError
from pipelines.plan.planner import eval_plans
from tests.oddities import bad_files, encode, good_files, picture, write_files
from tools.make_ffcv import main

CPU = torch.device("cpu")
IMAGES = 12
PADDING = {"zeros.jpg": bytes(64), "ones.jpg": b"\xff" * 64, "text.jpg": b"garbage between segments"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A complete file of JPEGs and pixels, which tests must not change."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "data").mkdir()
    for i in range(IMAGES):
        kind = "JPEG" if i % 3 else "PNG"
        (folder / "data" / f"{i:02}.{kind}").write_bytes(encode(picture(40 + i, 60), kind))
    assert main([str(folder / "data"), str(folder / "out.beton")]) == 0
    return folder / "out.beton"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A complete file that a test may damage."""
    for suffix in ("", ".json"):
        (tmp_path / f"copy.beton{suffix}").write_bytes(Path(f"{finished}{suffix}").read_bytes())
    return tmp_path / "copy.beton"


@pytest.fixture
def large(monkeypatch):
    """Every file is longer than those that are read completely when they are opened."""
    monkeypatch.setattr(beton, "HASHED_BYTES", 0)


def pixels_of(index: ImageIndex) -> list[np.ndarray]:
    return [index.read(i) for i in range(len(index))]


def image_range(index: ImageIndex, i: int) -> tuple[int, int]:
    assert index.records is not None
    start = int(index.records.offsets[i])
    return start, start + int(index.records.lengths[i])


def jpeg_crops(name: str, index: ImageIndex) -> torch.Tensor:
    """(8, 16, 16, 3) uint8: images 1, 2, 4, 5, …, whole. (DALI takes JPEGs only.)"""
    source = open_source(name, index, 16, CPU, 0 if name == "torch" else 1)
    try:
        (crops,) = source.crops(eval_plans(index.sizes, np.array([i for i in range(IMAGES) if i % 3]), 8, 16))
        return crops.images[0].clone()
    finally:
        source.close()


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        old = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([old ^ 1 << bit % 8]))


def refusal(read: Callable[[], list[np.ndarray]], expected: list[np.ndarray]) -> str:
    """The message of the error, or "" where the pixels are those that were written."""
    try:
        found = read()
    except DataError as error:
        return str(error)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), "other pixels, and no error"
    return ""


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_flipped_bit_in_a_beton_file_is_refused(copy, request, size):
    """A flipped bit in a .beton file of any length is found before the image is used."""
    if size == "large":
        request.getfixturevalue("large")
    index = read_index(str(copy))
    expected, draw, spans = pixels_of(index), random.Random(0), [(0, 5000), *(image_range(index, i) for i in range(12))]
    for _ in range(40):
        start, end = draw.choice(spans)
        bit = draw.randrange(8 * start, 8 * end)
        flip(copy, bit)
        message = refusal(lambda: pixels_of(read_index(str(copy))), expected)
        assert message or bit < 8 * 5000, f"bit {bit}"
        assert "\n" not in message
        assert not message or "convert again" in message
        flip(copy, bit)
    assert refusal(lambda: pixels_of(read_index(str(copy))), expected) == ""


def test_a_flipped_bit_in_a_beton_manifest_is_refused(copy):
    """A flipped bit in the manifest of a .beton file, in a name or a digest, is found when it is opened."""
    path, expected = Path(f"{copy}.json"), BetonManifest.from_json(Path(f"{copy}.json").read_text())
    draw, refused = random.Random(0), 0
    for _ in range(120):
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        try:
            index = read_index(str(copy))
            assert BetonManifest.from_json(path.read_text()) == expected, f"bit {bit}"
            assert index.records is not None
            assert list(index.records.names) == expected.names, f"bit {bit}"
        except DataError as error:
            refused += "copy.beton.json is not a usable manifest" in str(error)
        flip(path, bit)
    assert refused > 100


def test_the_error_names_image_file_and_bytes(copy, large):
    """The error for a damaged image names it, its file, the range of bytes and the remedy."""
    start, end = image_range(read_index(str(copy)), 4)
    flip(copy, 8 * start + 4000)
    with pytest.raises(DataError, match=rf"^04\.JPEG in {copy} has changed .*bytes {start:,} to {end - 1:,}") as error:
        read_index(str(copy)).read(4)
    assert str(error.value).endswith("copy the file again, or convert again")


def test_opening_a_large_file_reads_no_image(copy, large, monkeypatch):
    """A large .beton file is opened without reading its images."""
    monkeypatch.setattr(beton, "read_at", lambda *_: pytest.fail("an image was read"))
    index = read_index(str(copy))
    assert index.records is not None
    assert index.records.digests is not None
    assert not index.records.digests.checked.any()


@pytest.mark.parametrize("image", [3, 4], ids=["pixels", "jpeg"])
def test_the_compiled_loader_refuses_a_damaged_image(copy, large, require_backend, image):
    """--pipeline ffcv uses no image of a large file before it was compared with its digest."""
    require_backend("ffcv")
    index = read_index(str(copy))
    flip(copy, 8 * image_range(index, image)[1] - 5000)
    source = FfcvCrops(index, 16, CPU, 2)
    (first, *_), others = list(eval_plans(index.sizes, np.array([image]), 1, 16)), [i for i in range(12) if i != image]
    assert len(list(source.crops(eval_plans(index.sizes, np.array(others), 4, 16)))) == 3
    with pytest.raises(DataError, match=rf"{image:02}\.\w+ in .*copy\.beton has changed since it was written"):
        list(source.crops([first]))
    source.close()


@pytest.mark.parametrize("name", ["ffcv", "torch", "dali", "resident"])
def test_every_backend_refuses_or_replaces_a_damaged_image(copy, large, require_backend, name, tmp_path):
    """No backend uses a damaged image: it ends the run, or is replaced by grey and listed where that is allowed."""
    if name in ("ffcv", "dali"):
        require_backend(name)
    flip(copy, 8 * image_range(read_index(str(copy)), 4)[1] - 4000)
    with pytest.raises(DataError, match=r"04\.JPEG in .* has changed since it was written"):
        jpeg_crops(name, read_index(str(copy)))
    ledger = Ledger(str(tmp_path / "ledger"), most=1)
    crops = jpeg_crops(name, replace(read_index(str(copy)), ledger=ledger))
    assert (crops[2] == crops[2, 0, 0]).all(), "one colour"
    assert (crops[1] != crops[1, 0, 0]).any()
    assert '"04.JPEG in ' in (tmp_path / "ledger").read_text()


def test_the_compiled_loader_hashes_an_image_once(copy, large, require_backend, monkeypatch):
    """Comparing images with their digests costs time in the first epoch only."""
    require_backend("ffcv")
    hashed, digest = [], record_digests.digest
    monkeypatch.setattr(record_digests, "digest", lambda data: hashed.append(len(data)) or digest(data))
    index = read_index(str(copy))
    source = FfcvCrops(index, 16, CPU, 2)
    for _ in range(3):
        list(source.crops(eval_plans(index.sizes, np.arange(12), 5, 16)))
    source.close()
    assert index.records is not None
    assert sorted(hashed) == sorted(index.records.lengths.tolist())


# ---- what a converter accepts, its reader accepts --------------------------------------------------------------------


def padded(padding: bytes, at: int) -> bytes:
    """A JPEG with other bytes before its segment number `at`."""
    data = encode(picture(), "JPEG", quality=95, subsampling=0)
    position = 2
    for _ in range(at):
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return data[:position] + padding + data[position:]


def odd_jpegs() -> dict[str, bytes]:
    """JPEGs with something before, inside or behind what they need; some of them decode."""
    whole = encode(picture(), "JPEG", quality=95, subsampling=0)
    found = {f"{at}-{name}": padded(padding, at) for at in range(5) for name, padding in PADDING.items()}
    found |= {f"before-{name}": padding + whole for name, padding in PADDING.items()}
    return found | {
        "no-end.jpg": whole[:-2],
        "half-an-end.jpg": whole[:-1],
        "twice.jpg": whole + whole,
        "far-end.jpg": whole[:-2] + bytes(9000) + whole[-2:],
        "rgb.jpg": encode(picture(), "JPEG", keep_rgb=True),
        "restarts.jpg": encode(picture(), "JPEG", restart_marker_rows=1),
        "thumbnail-and-half.jpg": whole[:2] + b"\xff\xe1" + (len(whole) + 2).to_bytes(2) + whole + whole[2:900],
    }


def files(folder: Path) -> Path:
    write_files(folder, good_files())
    write_files(folder, bad_files())
    for name, data in odd_jpegs().items():
        (folder / name).write_bytes(data)
    for i in range(300):  # of which the bad ones are less than a tenth
        (folder / f"more-{i:03}.png").write_bytes(encode(picture(4, 5), "PNG"))
    return folder


@pytest.mark.parametrize("flags", [[], ["--quality", "95"], ["--mode", "raw"]], ids=["copied", "encoded", "raw"])
def test_what_the_converter_takes_the_reader_takes(tmp_path, flags):
    """Whatever image file the converter takes can be read from its .beton file, with the pixels of the file itself."""
    folder, out = files(tmp_path / "data"), tmp_path / "odd.beton"
    assert main([str(folder), str(out), "--bad-images", "quarantine", *flags]) == 0
    direct, index = load_dataset(str(folder), data_root=".", bad_images="quarantine").train, read_index(str(out))
    assert direct.paths is not None
    assert index.records is not None
    original = {Path(path).name: i for i, path in enumerate(direct.paths)}
    left_out = {Path(name).name for name, _ in BetonManifest.from_json(Path(f"{out}.json").read_text()).quarantine}
    assert set(index.records.names) | left_out == {path.name for path in folder.iterdir()}
    for i, name in enumerate(index.records.names):
        difference = np.abs(index.read(i).astype(int) - direct.read(original[name]))
        if "--quality" not in flags:
            assert difference.max() == 0, name
        elif difference.size > 1000:  # of a few pixels, JPEG keeps less
            assert difference.mean() < 4, name


def test_what_the_disk_does_not_keep_is_no_success(finished, tmp_path, monkeypatch, capsys):
    """A converter reads again what it wrote: on a disk that loses bytes it fails, and leaves nothing."""
    from pipelines.data import beton_writer

    write_at = beton_writer.write_at

    def lossy(descriptor: int, data: memoryview, offset: int) -> int:
        return write_at(descriptor, bytes(len(data)) if len(data) == 3 * 43 * 60 else data, offset)

    monkeypatch.setattr(beton_writer, "write_at", lossy)
    assert main([str(finished.parent / "data"), str(tmp_path / "out.beton")]) == 3
    assert "03.PNG in " in (error := capsys.readouterr().err)
    assert "has changed since it was written" in error
    assert list(tmp_path.iterdir()) == []
