"""Conversion to `.beton`: exact, and complete or absent."""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.run import environment
from pipelines.data.beton import read_index
from pipelines.data.beton_writer import BetonWriter
from pipelines.data.dataset import load_dataset
from pipelines.data.decode import decode
from pipelines.errors import DataError
from tests.oddities import bad_files, encode, good_files, picture, write_files
from tools import make_ffcv
from tools.make_ffcv import main

REPOSITORY = Path(__file__).parents[2]


def class_folders(root: Path) -> Path:
    """Two classes, with images of different sizes and kinds."""
    for name in ("fox", "ünï"):
        (root / name).mkdir(parents=True)
        for i, (height, width) in enumerate([(40, 56), (24, 31), (64, 48)]):
            (root / name / f"{i}.jpg").write_bytes(encode(picture(height, width), "JPEG", quality=90 + i))
    (root / "fox" / "palette.png").write_bytes(encode(Image.fromarray(picture()).quantize(16), "PNG"))
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A complete file of seven images, which tests must not change."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(class_folders(folder / "data")), str(folder / "out.beton")]) == 0
    return folder / "out.beton"


def test_a_file_equals_the_folder_it_was_made_from(finished):
    """Same order, names, labels, sizes and pixels; JPEGs byte for byte."""
    folder = load_dataset(str(finished.parent / "data"), data_root=".").train
    index = read_index(str(finished))
    assert index.class_names == folder.class_names == ("fox", "ünï")
    assert index.labels is not None
    assert folder.labels is not None
    np.testing.assert_array_equal(index.labels, folder.labels)
    np.testing.assert_array_equal(index.sizes, folder.sizes)
    assert index.records is not None
    assert folder.paths is not None
    assert index.records.names == tuple(os.path.relpath(path, finished.parent / "data") for path in folder.paths)
    for i, path in enumerate(folder.paths):
        np.testing.assert_array_equal(index.read(i), folder.read(i))
        if path.endswith(".jpg"):
            assert index.read_bytes(i) == Path(path).read_bytes()
    with pytest.raises(DataError, match=r"palette\.png in .*raw pixels"):
        index.read_bytes([path.endswith(".png") for path in folder.paths].index(True))


def test_odd_files_keep_their_pixels(tmp_path):
    """Every kind of file and EXIF orientation: copied only if all decoders agree on it."""
    files = good_files()
    write_files(tmp_path / "data", files)
    assert main([str(tmp_path / "data"), str(tmp_path / "odd.beton")]) == 0
    folder, index = load_dataset(str(tmp_path / "data"), data_root=".").train, read_index(str(tmp_path / "odd.beton"))
    assert len(index) == len(folder)
    assert index.labels is None
    for i in range(len(index)):
        np.testing.assert_array_equal(index.read(i), folder.read(i), err_msg=index.display_name(i))


@pytest.mark.parametrize(
    ("flags", "size", "how"),
    [
        (["--mode", "raw"], (40, 56), {"raw": 7}),
        (["--mode", "proportion", "--proportion", "0"], (40, 56), {"raw": 7}),
        (["--mode", "proportion", "--proportion", "1"], (40, 56), {"copied": 6, "raw": 1}),
        (["--quality", "90"], (40, 56), {"copied": 6, "encoded": 1}),
        (["--max-resolution", "28"], (20, 28), {"encoded": 7}),
        (["--min-resolution", "30"], (30, 42), {"copied": 2, "encoded": 5}),
        (["--max-resolution", "28", "--mode", "raw"], (20, 28), {"raw": 7}),
    ],
)
def test_settings(finished, tmp_path, flags, size, how):
    out = str(tmp_path / "out.beton")
    assert main([str(finished.parent / "data"), out, *flags]) == 0
    index = read_index(out)
    assert tuple(index.sizes[0]) == size
    pixels = decode((finished.parent / "data" / "fox" / "0.jpg").read_bytes(), "0")
    shrunk = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.abs(index.read(0).astype(int) - shrunk).mean() < 3
    stored = json.loads(Path(f"{out}.json").read_text())["stored"]
    assert {kind: count for kind, count in stored.items() if count} == how


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quality", "0"], "--quality 0: expected 1 to 100"),
        (["--max-resolution", "9", "--min-resolution", "9"], "give one of them"),
        (["--split", "test"], "has no test split"),
    ],
)
def test_wrong_settings_are_exit_2(finished, tmp_path, capsys, flags, message):
    assert main([str(finished.parent / "data"), str(tmp_path / "out.beton"), *flags]) == 2
    assert message in capsys.readouterr().err


def body_damaged() -> bytes:
    """A JPEG that fails only on decoding: an invalid Huffman table."""
    data = bytearray(encode(picture(200, 300), "JPEG"))
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16
    return bytes(data)


def test_a_bad_image_is_exit_3_within_five_seconds(tmp_path, capsys):
    folder = class_folders(tmp_path / "data")
    (folder / "fox" / "bad.jpg").write_bytes(body_damaged())
    started = time.monotonic()
    assert main([str(folder), str(tmp_path / "out.beton")]) == 3
    assert time.monotonic() - started < 5
    assert "fox/bad.jpg is not a usable image" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_quarantine_leaves_bad_images_out_and_lists_them(tmp_path):
    folder = class_folders(tmp_path / "data")
    for i in range(20):
        (folder / "fox" / f"more{i}.jpg").write_bytes(encode(picture(8 + i, 9), "JPEG"))
    (folder / "fox" / "bad.jpg").write_bytes(body_damaged())
    truncated = next(file for file in bad_files() if file.in_header)
    (folder / "fox" / "truncated.jpg").write_bytes(truncated.data)
    out = str(tmp_path / "out.beton")
    assert main([str(folder), out, "--bad-images", "quarantine"]) == 0
    assert len(read_index(out)) == 27
    left_out = json.loads(Path(f"{out}.json").read_text())["quarantine"]
    assert sorted(os.path.basename(name) for name, _ in left_out) == ["bad.jpg", "truncated.jpg"]


def test_an_existing_file_is_not_replaced(finished, capsys):
    before = finished.read_bytes()
    assert main([str(finished.parent / "data"), str(finished)]) == 3
    assert "out.beton exists; remove it, or choose another name" in capsys.readouterr().err
    assert finished.read_bytes() == before


def test_two_writers_do_not_mix(tmp_path):
    path = str(tmp_path / "out.beton")
    with BetonWriter(path, 1, 10), pytest.raises(DataError, match="another process is writing"):
        BetonWriter(path, 1, 10)


KILLED = """
import os, signal, sys
import numpy
from pipelines.data import beton_writer
from pipelines.data.beton_manifest import BetonManifest

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def manifest(length, tables, file):
    return BetonManifest(
        dataset="x", bytes=length, images=1, tables_sha256=tables, image_digests=file, class_names=["a"], names=["one"],
        stored={}, settings={}, quarantine=[], versions={},
    )

def write(path, moment):
    with beton_writer.BetonWriter(path, 2, 100) as writer:
        writer.add(numpy.zeros((2, 2, 3), numpy.uint8), (2, 2), 0, "one")
        if moment == "adding":
            die()
        if moment == "checking":
            beton_writer.checked_index = die
        if moment == "renaming":
            os.rename = die
        writer.finish(die if moment == "tables" else manifest)

for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        write(path, os.path.basename(path).removesuffix(".beton"))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, path
"""


@pytest.mark.slow
def test_a_killed_conversion_never_looks_complete(tmp_path):
    paths = [tmp_path / f"{moment}.beton" for moment in ("adding", "tables", "checking", "renaming")]
    subprocess.run([sys.executable, "-c", KILLED, *map(str, paths)], cwd=REPOSITORY, timeout=60, check=True)
    folder = str(class_folders(tmp_path / "data"))
    for path in paths:
        assert [entry for entry in tmp_path.glob(f"{path.name}*") if entry.name != path.name]
        with pytest.raises(DataError, match="No such file"):
            read_index(str(path))
        assert main([folder, str(path)]) == 0  # leftovers do not prevent it
        assert len(read_index(str(path))) == 7
        assert sorted(entry.name for entry in tmp_path.glob(f"{path.name}*")) == [path.name, f"{path.name}.json"]


READ_BY_FFCV = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from ffcv import types
from ffcv.memory_managers import OSCacheManager
from ffcv.reader import Reader
from pipelines.data.beton import read_index
from pipelines.data.beton_format import ALLOCATION, FIELD, HEADER, SAMPLE
reader, index = Reader(sys.argv[1]), read_index(sys.argv[1])
assert types.HeaderType.itemsize == HEADER.itemsize and types.FieldDescType.itemsize == FIELD.itemsize
assert types.ALLOC_TABLE_TYPE.itemsize == ALLOCATION.itemsize and reader.metadata_type.itemsize == SAMPLE.itemsize
assert reader.field_names == ["image", "label"] and reader.num_samples == len(index)
np.testing.assert_array_equal(reader.metadata["f1"], index.labels)
np.testing.assert_array_equal(reader.metadata["f0"]["height"], index.sizes[:, 0])
np.testing.assert_array_equal(reader.metadata["f0"]["width"], index.sizes[:, 1])
manager = OSCacheManager(reader)
with manager.schedule_epoch([]) as context:
    read = manager.compile_reader()
    for i, pointer in enumerate(reader.metadata["f0"]["data_ptr"]):
        assert read(pointer, context.state).tobytes() == index.records.read(i)
print("the same")
"""


@pytest.mark.slow
def test_ffcv_reads_the_file_too(finished, require_backend):
    """FFCV's reader gives the same labels, sizes and bytes. In a separate process: it changes thread counts."""
    require_backend("ffcv")
    done = subprocess.run(
        [sys.executable, "-c", READ_BY_FFCV, str(finished)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "the same\n", done.stderr


def test_a_checkout_that_is_not_installed_converts_too(tmp_path, monkeypatch):
    """The version is then that of pyproject.toml, and it is asked for before the first image."""

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(make_ffcv, "version", environment.version.__wrapped__)
    assert main([str(class_folders(tmp_path / "data")), str(tmp_path / "out.beton")]) == 0
    (manifest,) = tmp_path.glob("out.beton*.json")
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert json.loads(manifest.read_text())["versions"]["fastmoco"] == declared
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.version.__wrapped__() == "unknown"
