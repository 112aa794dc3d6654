"""Conversion to `.beton`: exact, whole or absent; and reading: what is damaged is refused, in one line."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import beton
from pipelines.beton import HEADER, SAMPLE, SAMPLES_AT, Manifest, jpeg_size, read_index, read_tables
from pipelines.beton_writer import BetonWriter
from pipelines.dataset import load_dataset
from pipelines.decode import decode
from pipelines.errors import DataError
from tests.oddities import bad_files, encode, good_files, picture, write_files
from tools.make_ffcv import main

REPOSITORY = Path(__file__).parent.parent


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
    """A finished file of seven images, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(class_folders(folder / "data")), str(folder / "out.beton")]) == 0
    return folder / "out.beton"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A finished file that a test may damage."""
    for suffix in ("", ".json"):
        (tmp_path / f"copy.beton{suffix}").write_bytes(Path(f"{finished}{suffix}").read_bytes())
    return tmp_path / "copy.beton"


def vouch(path: Path, **changes) -> None:
    """Make the manifest agree with the file again, as a hostile or confused writer would."""
    data, manifest = path.read_bytes(), json.loads(Path(f"{path}.json").read_text())
    with path.open("rb") as file:
        tables = read_tables(file, "the test's own file").sha256
    manifest |= {"bytes": len(data), "tables_sha256": tables, "file_sha256": hashlib.sha256(data).hexdigest()}
    Path(f"{path}.json").write_text(json.dumps(manifest | changes))


def test_a_file_is_the_folder_it_came_from(finished):
    """Same order, names, labels, sizes and pixels; JPEGs to the byte."""
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
    """Every kind of file and EXIF orientation: copied only where a decoder needs to know nothing about it."""
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
    whole = decode((finished.parent / "data" / "fox" / "0.jpg").read_bytes(), "0")
    shrunk = np.asarray(Image.fromarray(whole).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.abs(index.read(0).astype(int) - shrunk).mean() < 3
    stored = json.loads(Path(f"{out}.json").read_text())["stored"]
    assert {kind: count for kind, count in stored.items() if count} == how


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--quality", "0"], "--quality 0: expected 1 to 100"),
        (["--max-resolution", "9", "--min-resolution", "9"], "give one of them"),
        (["--split", "test"], "has no test split"),
    ],
)
def test_wrong_settings_are_exit_2(finished, tmp_path, capsys, flags, found):
    assert main([str(finished.parent / "data"), str(tmp_path / "out.beton"), *flags]) == 2
    assert found in capsys.readouterr().err


def body_damaged() -> bytes:
    """A JPEG that only decoding shows to be bad: a Huffman table that makes no sense."""
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


def test_an_existing_file_is_not_replaced(copy, capsys):
    before = copy.read_bytes()
    assert main([str(REPOSITORY), str(copy)]) == 3
    assert main([str(copy.parent), str(copy)]) == 3
    assert "exist" in capsys.readouterr().err
    assert copy.read_bytes() == before


def test_two_writers_do_not_mix(tmp_path):
    path = str(tmp_path / "out.beton")
    with BetonWriter(path, 1, 10), pytest.raises(DataError, match="another process is writing"):
        BetonWriter(path, 1, 10)


KILLED = """
import os, signal, sys
from pipelines import beton_writer
from pipelines.beton import Manifest

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def manifest(length, tables, whole):
    return Manifest(dataset="x", bytes=length, images=1, tables_sha256=tables, file_sha256=whole, class_names=["a"],
                    names=["one"], stored={}, settings={}, quarantine=[], versions={})

def write(path, moment):
    with beton_writer.BetonWriter(path, 2, 100) as writer:
        writer.add(b"x" * 100, (2, 2), 0, "one")
        if moment == "adding":
            die()
        if moment == "renaming":
            os.rename = die
        if moment == "renamed":
            beton_writer._sync_folder = die
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
    paths = [tmp_path / f"{moment}.beton" for moment in ("adding", "tables", "renaming", "renamed")]
    subprocess.run([sys.executable, "-c", KILLED, *map(str, paths)], cwd=REPOSITORY, timeout=60, check=True)
    folder = str(class_folders(tmp_path / "data"))
    for path in paths:
        with pytest.raises(DataError, match=r"No such file|did not finish"):
            read_index(str(path))
        path.unlink(missing_ok=True)
        assert main([folder, str(path)]) == 0  # what else is left is no obstacle
        assert len(read_index(str(path))) == 7


def damage_header(name: str, value: int):
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        header = np.frombuffer(data, HEADER, 1)
        header[name] = value
        path.write_bytes(data)

    return damage


DAMAGE = {
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "its manifest says"),
    "8 bytes short": (lambda path: os.truncate(path, path.stat().st_size - 8), "its manifest says"),
    "empty": (lambda path: os.truncate(path, 0), "is 0 bytes and its manifest says"),
    "another version": (damage_header("version", 1), "its version is 1, expected 2"),
    "absurd count": (damage_header("samples", 2**63), "claims 9,223,372,036,854,775,808 images"),
    "absurd table": (damage_header("allocations_at", 2**64 - 8), "do not fit"),
    "no manifest": (lambda path: Path(f"{path}.json").unlink(), "its conversion did not finish"),
    "half a manifest": (lambda path: os.truncate(f"{path}.json", 100), "is not a usable manifest"),
    "a manifest of something": (lambda path: Path(f"{path}.json").write_text("[]"), "is not a usable manifest"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_refused_in_one_line(copy, fault):
    damage, found = DAMAGE[fault]
    damage(copy)
    with pytest.raises(DataError, match=found) as error:
        read_index(str(copy))
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_refused(copy):
    data = bytearray(copy.read_bytes())
    data[read_index(str(copy)).records.offsets[2] + 300] ^= 1  # pyright: ignore[reportOptionalMemberAccess]
    copy.write_bytes(data)
    with pytest.raises(DataError, match="not as it was written"):
        read_index(str(copy))


def test_the_headers_of_jpegs_are_checked_where_the_hash_is_not(copy, monkeypatch):
    monkeypatch.setattr(beton, "HASHED_BYTES", 0)
    index = read_index(str(copy))
    assert index.records is not None
    start, length = int(index.records.offsets[1]), int(index.records.lengths[1])
    whole = copy.read_bytes()
    for found, part in {
        "no whole JPEG": slice(start, start + length),  # a page that never reached the disk
        "is no whole": slice(start + length - 2, start + length),
    }.items():
        data = bytearray(whole)
        data[part] = bytes(len(data[part]))
        copy.write_bytes(data)
        with pytest.raises(DataError, match=found):
            read_index(str(copy))
    data = bytearray(whole)
    rows = np.frombuffer(data, SAMPLE, 7, SAMPLES_AT)
    rows["height"][1] += 1
    copy.write_bytes(data)
    vouch(copy)
    with pytest.raises(DataError, match=r"1\.jpg in .* a JPEG of 31×24 pixels, expected 31×25"):
        read_index(str(copy))


def test_labels_outside_the_classes_are_refused(copy):
    vouch(copy, class_names=["fox"])
    with pytest.raises(DataError, match="labels 0 to 1 and its manifest names 1 classes"):
        read_index(str(copy))


def test_jpeg_size_reads_past_anything_that_may_stand_before_the_frame():
    for options in ({}, {"progressive": True}, {"icc_profile": bytes(70_000)}, {"comment": b"\xff\xc0" * 20}):
        assert jpeg_size(encode(picture(30, 50), "JPEG", **options)) == (30, 50)
    assert jpeg_size(encode(picture(30, 50), "PNG")) is None
    assert jpeg_size(encode(picture(30, 50), "JPEG")[:40]) is None


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_tables_crash_the_reader(finished, data):
    """Any few bytes of header and tables replaced, at any length: DataError, or tables that stay inside the file."""
    content = bytearray(finished.read_bytes())
    length = data.draw(st.sampled_from([0, 23, SAMPLES_AT, len(content) - 8, len(content), len(content)]))
    del content[length:]
    tables = [(0, 24), (SAMPLES_AT, SAMPLES_AT + 7 * 24), (len(content) - 7 * 24, len(content)), (24, SAMPLES_AT)]
    for _ in range(data.draw(st.integers(1, 4))):
        low, high = data.draw(st.sampled_from(tables))
        if 0 <= low < high <= len(content):
            place = data.draw(st.integers(low, high - 1))
            content[place : min(place + 8, high)] = data.draw(st.binary(min_size=1, max_size=8))[: high - place]
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            found = read_tables(file, "mutated")
        except DataError:
            return
        pointers = found.samples["pointer"].astype(np.int64)
        assert (pointers >= SAMPLES_AT).all()
        assert (pointers + found.lengths <= len(content)).all()


@given(text=st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
@settings(max_examples=100, deadline=None)
def test_no_text_crashes_the_manifest(text):
    with pytest.raises(ValueError):  # noqa: PT011 - json's or ours
        Manifest.from_json(text)


@given(
    field=st.sampled_from([field.name for field in dataclasses.fields(Manifest)]),
    value=st.none() | st.integers() | st.text() | st.lists(st.integers(), max_size=3) | st.lists(st.text(), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_no_field_crashes_the_manifest(finished, field, value):
    values = json.loads(Path(f"{finished}.json").read_text()) | {field: value}
    try:
        manifest = Manifest.from_json(json.dumps(values))
    except ValueError:
        return
    assert len(manifest.names) == manifest.images


READ_BY_FFCV = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from ffcv import types
from ffcv.memory_managers import OSCacheManager
from ffcv.reader import Reader
from pipelines.beton import ALLOCATION, FIELD, HEADER, SAMPLE, read_index
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
    """Its own reader finds the same labels, sizes and bytes. In a process of its own: it changes thread counts."""
    require_backend("ffcv")
    done = subprocess.run(
        [sys.executable, "-c", READ_BY_FFCV, str(finished)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "the same\n", done.stderr
