"""Reading a `.beton` file: damage is refused before the first batch, with a one-line message."""

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import beton
from pipelines.data.beton import jpeg_size, read_index
from pipelines.data.beton_format import HEADER, SAMPLE, SAMPLES_AT, read_tables
from pipelines.data.beton_manifest import EARLIER_FORMAT, BetonManifest, sealed_manifest
from pipelines.data.record_digests import RecordDigests, digest
from pipelines.errors import DataError
from tests.oddities import encode, picture
from tests.tools.test_make_ffcv import class_folders
from tools.make_ffcv import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A complete file of seven images, which tests must not change."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(class_folders(folder / "data")), str(folder / "out.beton")]) == 0
    return folder / "out.beton"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A complete file that a test may damage."""
    for suffix in ("", ".json"):
        (tmp_path / f"copy.beton{suffix}").write_bytes(Path(f"{finished}{suffix}").read_bytes())
    return tmp_path / "copy.beton"


def update_manifest(path: Path, **changes) -> None:
    """Make the manifest match the file again, as a hostile or faulty writer would."""
    data, manifest = path.read_bytes(), BetonManifest.from_json(Path(f"{path}.json").read_text())
    with path.open("rb") as file:
        tables = read_tables(file, "the test's own file")
    starts = tables.samples["pointer"].tolist()
    digests = [digest(data[start : start + length]) for start, length in zip(starts, tables.lengths, strict=True)]
    values = {"bytes": len(data), "tables_sha256": tables.sha256, "image_digests": RecordDigests.text(digests)}
    Path(f"{path}.json").write_text(dataclasses.replace(manifest, **(values | changes)).to_json())


def earlier_manifest(path: Path) -> None:
    """The manifest as version 0.1.0 wrote it: a hash of the file, none of its images or of the manifest."""
    update_manifest(path)
    values = json.loads(Path(f"{path}.json").read_text())
    del values["image_digests"], values["manifest_sha256"]
    values |= {"format": EARLIER_FORMAT, "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    Path(f"{path}.json").write_text(json.dumps(values, indent=1))


def damage_header(name: str, value: int):
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        header = np.frombuffer(data, HEADER, 1)
        header[name] = value
        path.write_bytes(data)

    return damage


DAMAGE = {
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "in its manifest"),
    "8 bytes short": (lambda path: os.truncate(path, path.stat().st_size - 8), "in its manifest"),
    "empty": (lambda path: os.truncate(path, 0), "has 0 bytes, but .* in its manifest"),
    "another version": (damage_header("version", 1), "its version is 1, expected 2"),
    "absurd count": (damage_header("samples", 2**63), "claims 9,223,372,036,854,775,808 images"),
    "absurd table": (damage_header("allocations_at", 2**64 - 8), "do not fit"),
    "no manifest": (lambda path: Path(f"{path}.json").unlink(), "its conversion did not finish"),
    "half a manifest": (lambda path: os.truncate(f"{path}.json", 100), "is not a usable manifest"),
    "a manifest of something": (lambda path: Path(f"{path}.json").write_text("[]"), "is not a usable manifest"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_refused_in_one_line(copy, fault):
    damage, message = DAMAGE[fault]
    damage(copy)
    with pytest.raises(DataError, match=message) as error:
        read_index(str(copy))
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_refused(copy):
    data = bytearray(copy.read_bytes())
    data[read_index(str(copy)).records.offsets[2] + 300] ^= 1  # pyright: ignore[reportOptionalMemberAccess]
    copy.write_bytes(data)
    with pytest.raises(DataError, match="has changed since it was written"):
        read_index(str(copy))


def test_jpeg_headers_are_checked_if_an_earlier_file_is_not_hashed(copy, monkeypatch):
    earlier_manifest(copy)
    monkeypatch.setattr(beton, "HASHED_BYTES", 0)
    index = read_index(str(copy))
    assert index.records is not None
    start, length = int(index.records.offsets[1]), int(index.records.lengths[1])
    content = copy.read_bytes()
    for message, span in {
        "is not a complete JPEG": slice(start, start + length),  # a page that was not written to disk
        "not a complete": slice(start + length - 2, start + length),
    }.items():
        data = bytearray(content)
        data[span] = bytes(len(data[span]))
        copy.write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_index(str(copy))


def test_a_jpeg_of_another_size_than_its_table_says_is_refused(copy):
    data = bytearray(copy.read_bytes())
    rows = np.frombuffer(data, SAMPLE, 7, SAMPLES_AT)
    rows["height"][1] += 1
    copy.write_bytes(data)
    update_manifest(copy)
    with pytest.raises(DataError, match=r"1\.jpg in .* a JPEG of 31×24 pixels, expected 31×25"):
        read_index(str(copy))


def test_an_earlier_manifest_is_read(copy):
    expected = read_index(str(copy))
    earlier_manifest(copy)
    index = read_index(str(copy))
    assert all(np.array_equal(index.read(i), expected.read(i)) for i in range(len(index)))
    data = bytearray(copy.read_bytes())
    data[int(index.records.offsets[2]) + 300] ^= 1  # pyright: ignore[reportOptionalMemberAccess]
    copy.write_bytes(data)
    with pytest.raises(DataError, match="has changed since it was written"):
        read_index(str(copy))


def test_labels_outside_the_classes_are_refused(copy):
    update_manifest(copy, class_names=["fox"])
    with pytest.raises(DataError, match="labels 0 to 1, but 1 classes in its manifest"):
        read_index(str(copy))


def test_jpeg_size_skips_segments_before_the_frame():
    for options in ({}, {"progressive": True}, {"icc_profile": bytes(70_000)}, {"comment": b"\xff\xc0" * 20}):
        assert jpeg_size(encode(picture(30, 50), "JPEG", **options)) == (30, 50)
    assert jpeg_size(encode(picture(30, 50), "PNG")) is None
    assert jpeg_size(encode(picture(30, 50), "JPEG")[:40]) is None


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_tables_crash_the_reader(finished, data):
    """A few bytes of header and tables replaced, at any length: DataError, or tables inside the file."""
    content = bytearray(finished.read_bytes())
    length = data.draw(st.sampled_from([0, 23, SAMPLES_AT, len(content) - 8, len(content), len(content)]))
    del content[length:]
    tables = [(0, 24), (SAMPLES_AT, SAMPLES_AT + 7 * 24), (len(content) - 7 * 24, len(content)), (24, SAMPLES_AT)]
    for _ in range(data.draw(st.integers(1, 4))):
        low, high = data.draw(st.sampled_from(tables))
        if 0 <= low < high <= len(content):
            at = data.draw(st.integers(low, high - 1))
            content[at : min(at + 8, high)] = data.draw(st.binary(min_size=1, max_size=8))[: high - at]
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            mutated = read_tables(file, "mutated")
        except DataError:
            return
        pointers = mutated.samples["pointer"].astype(np.int64)
        assert (pointers >= SAMPLES_AT).all()
        assert (pointers + mutated.lengths <= len(content)).all()


@given(text=st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
@settings(max_examples=100, deadline=None)
def test_no_text_crashes_the_manifest_reader(text):
    with pytest.raises(ValueError):  # noqa: PT011 - json's or ours
        BetonManifest.from_json(text)


@given(
    field=st.sampled_from([field.name for field in dataclasses.fields(BetonManifest)]),
    value=st.none() | st.integers() | st.text() | st.lists(st.integers(), max_size=3) | st.lists(st.text(), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_no_field_crashes_the_manifest_reader(finished, field, value):
    values = json.loads(Path(f"{finished}.json").read_text()) | {field: value}
    try:
        manifest = BetonManifest.from_json(json.dumps(sealed_manifest(values)))
    except ValueError:
        return
    assert len(manifest.names) == manifest.images
