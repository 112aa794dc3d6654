"""A run resumes on the images it was trained on, or says which of them are others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run import data_record
from fastmoco.run.data_record import FILE_NAME, SAMPLE, difference, take
from pipelines.data import manifest
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from tests.oddities import encode, picture
from tools.make_shards import main as make_shards

TINY = ["--batch-size", "8", "--bn-splits", "2", "--moco-k", "8", "--width", "0.125", "--arch", "resnet18"]
TINY += ["--crop-size", "8", "--amp", "fp32", "--device", "cpu", "--workers", "0", "--cpu-threads", "1", "--knn-every"]
TINY += ["0"]
HOUR_NS = 3_600 * 10**9
COUNT = SAMPLE + 40


def write_images(folder: Path, count: int) -> Path:
    """Images of one size in bytes, whose times are an hour apart."""
    folder.mkdir()
    for i in range(count):
        write_image(folder / f"{i:03}.bmp", i)
        os.utime(folder / f"{i:03}.bmp", ns=(HOUR_NS * (i + 1), HOUR_NS * (i + 1)))
    return folder


def write_image(path: Path, shift: int) -> None:
    path.write_bytes(encode(np.roll(picture(12, 16), shift, axis=1) ^ np.uint8(shift % 251), "BMP"))


def blacken(path: Path) -> None:
    path.write_bytes(encode(np.zeros((12, 16, 3), dtype=np.uint8), "BMP"))


def swap(a: Path, b: Path) -> None:
    other = a.with_suffix(".tmp")
    a.rename(other)
    b.rename(a)
    other.rename(b)


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images` and a run of one epoch on them."""
    folder = tmp_path_factory.mktemp("trained")
    images = write_images(folder / "images", 16)
    assert main(["train", *TINY, "--data", str(images), "--epochs", "1", "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, with the same times."""
    shutil.copytree(trained, tmp_path / "copy")  # keeps the times
    return tmp_path / "copy"


def resume(folder: Path, *arguments: str) -> int:
    """Resumes for another epoch, and returns the exit code."""
    flags = ["--resume", "--out", str(folder / "run"), "--data", str(folder / "images"), "--epochs", "2"]
    return main(["train", *TINY, *flags, *arguments])


def all_black(images: Path) -> None:
    for path in images.iterdir():
        blacken(path)


def all_black_with_their_times(images: Path) -> None:
    for path in images.iterdir():
        times = path.stat().st_mtime_ns
        blacken(path)
        os.utime(path, ns=(times, times))


def one_replaced(images: Path) -> None:
    blacken(images / "005.bmp")


def two_swapped(images: Path) -> None:
    swap(images / "005.bmp", images / "009.bmp")


def one_longer(images: Path) -> None:
    with (images / "005.bmp").open("ab") as file:
        file.write(bytes(8))


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (all_black, "000.bmp", "has another content, and 15 more of 16 compared images"),
        (all_black_with_their_times, "000.bmp", "has another content, and 15 more of 16 compared images"),
        (one_replaced, "005.bmp", "has another content (one of 16 compared images)"),
        (two_swapped, "005.bmp", "has another content, and 1 more of 16 compared images"),
        (one_longer, "005.bmp", "has 638 bytes and had 630"),
    ],
)
def test_images_replaced_under_the_same_names_are_noticed(
    copy: Path, change: Callable[[Path], None], name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that were replaced under the same names are exit code 3 with `--resume`, naming the first of them."""
    change(copy / "images")
    checkpoints = sorted((copy / "run" / "checkpoints").iterdir())
    assert resume(copy) == ExitCode.DATA
    message = capsys.readouterr().err
    assert f"{name} {reason}" in message
    assert "--allow-changed-data" in message
    assert message.count("\n") == 1
    assert sorted((copy / "run" / "checkpoints").iterdir()) == checkpoints


def test_a_run_goes_on_with_other_images_if_asked(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With `--allow-changed-data` a run goes on with other images, says so, and later knows them."""
    one_replaced(copy / "images")
    assert resume(copy, "--allow-changed-data") == ExitCode.DONE
    assert "005.bmp has another content" in " ".join(capsys.readouterr().out.split())
    assert resume(copy, "--epochs", "3") == ExitCode.DONE


def test_a_copied_data_set_is_resumed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data set that was copied, and so has new times, is accepted by its contents."""
    for path in (copy / "images").iterdir():
        path.touch()
    assert resume(copy) == ExitCode.DONE
    output = " ".join(capsys.readouterr().out.split())
    assert "16 of 16 files have new modification times: their contents are the same" in output


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-30])])
def test_without_its_record_a_run_still_compares_contents(
    copy: Path, spoil: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where `data.npz` is missing or damaged, the hash in the checkpoint still tells other images."""
    spoil(copy / "run" / FILE_NAME)
    one_replaced(copy / "images")
    assert resume(copy) == ExitCode.DATA
    assert "the sizes or contents of the 16 files are not those of the checkpoint" in capsys.readouterr().err


# ---- many files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More files than are sampled; 001.bmp is sampled and `OUTSIDE` is not."""
    return write_images(tmp_path_factory.mktemp("many") / "images", COUNT)


OUTSIDE = next(i for i in range(COUNT) if i not in (np.arange(SAMPLE) * COUNT // SAMPLE).tolist())


@pytest.fixture
def images(many: Path, tmp_path: Path) -> Path:
    shutil.copytree(many, tmp_path / "images")
    return tmp_path / "images"


def index_of(folder: Path) -> ImageIndex:
    return load_dataset(str(folder), data_root=folder.parent).train


def changed(folder: Path, change: Callable[[Path], object]) -> data_record.Difference:
    """The difference that a change makes, with the record written and read in between."""
    before = take(index_of(folder))
    assert before is not None
    data_record.write(before, folder.parent / FILE_NAME)
    change(folder)
    images = index_of(folder)
    now = take(images)
    assert now is not None
    return difference(data_record.read(folder.parent / FILE_NAME), before.content, now, images)


def touch_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.touch()


def scan(folder: Path) -> None:
    assert main(["scan", str(folder), "--workers", "0"]) == ExitCode.DONE


def test_unchanged_files_are_the_same(images: Path) -> None:
    """Nothing is said about files that have the same sizes and times."""
    assert changed(images, lambda folder: None) == ("", "")


def test_one_file_replaced_outside_the_sample_is_noticed_by_its_time(images: Path) -> None:
    """A file that was replaced has another time than the rest, and is named even if it was not hashed."""
    error, _ = changed(images, lambda folder: blacken(folder / f"{OUTSIDE:03}.bmp"))
    assert error.endswith(f"{OUTSIDE:03}.bmp has another modification time (one of {COUNT} files)")


def test_a_swap_outside_the_sample_is_noticed_by_the_times(images: Path) -> None:
    """Two files that were swapped have each other's times."""
    outside = [f"{i:03}.bmp" for i in range(COUNT) if i not in (np.arange(SAMPLE) * COUNT // SAMPLE).tolist()]
    error, _ = changed(images, lambda folder: swap(folder / outside[0], folder / outside[1]))
    assert f"{outside[0]} has another modification time, and 1 more" in error


def test_a_copy_is_compared_by_its_sample(images: Path) -> None:
    """If all files have new times, the sizes of all and the contents of a sample decide."""
    error, note = changed(images, touch_all)
    assert not error
    assert f"{COUNT} of {COUNT} files have new modification times" in note
    assert f"the contents of {SAMPLE} images were compared" in note


def test_after_a_scan_every_content_is_compared(images: Path) -> None:
    """With a manifest of `fastmoco scan`, one replaced file is found even in a data set that was copied."""
    scan(images)

    def copy_and_replace(folder: Path) -> None:
        touch_all(folder)
        blacken(folder / f"{OUTSIDE:03}.bmp")

    error, _ = changed(images, copy_and_replace)
    assert f"{OUTSIDE:03}.bmp has another content than when it was scanned" in error


def test_a_touched_file_that_was_scanned_is_read_again(images: Path) -> None:
    """With a manifest of `fastmoco scan`, a file with a new time and the same content is the same file."""
    scan(images)
    error, note = changed(images, lambda folder: (folder / f"{OUTSIDE:03}.bmp").touch())
    assert not error
    assert note.endswith("their contents are the same")


def test_a_scan_whose_manifest_is_deleted_is_no_change(images: Path) -> None:
    """Without the manifest that a run began with, the images are compared as if they had not been scanned."""
    scan(images)
    error, _ = changed(images, lambda folder: (folder / manifest.FILE_NAME).unlink())
    assert not error


def test_two_scans_are_compared_without_reading(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that was scanned again is compared as a whole."""
    monkeypatch.setattr(data_record, "MAX_HASHED", 0)
    scan(images)

    def copy_replace_and_scan(folder: Path) -> None:
        touch_all(folder)
        blacken(folder / f"{OUTSIDE:03}.bmp")
        scan(folder)

    error, _ = changed(images, copy_replace_and_scan)
    assert f"{OUTSIDE:03}.bmp has another content than when it was scanned" in error


def test_replaced_archives_are_noticed(images: Path, tmp_path: Path) -> None:
    """Other images in archives of the same names are noticed, and archives that were copied are not."""

    def pack(folder: Path) -> None:
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        assert make_shards([str(folder), str(tmp_path / "shards")]) == 0

    def record() -> tuple[ImageIndex, data_record.DataRecord]:
        index = index_of(tmp_path / "shards")
        taken = take(index)
        assert taken is not None
        return index, taken

    pack(images)
    _, before = record()
    pack(images)
    index, copied = record()
    assert not difference(before, before.content, copied, index).error
    blacken(images / "000.bmp")
    pack(images)
    index, replaced = record()
    assert "has another content" in difference(before, before.content, replaced, index).error


def test_images_in_memory_are_hashed_as_before() -> None:
    """Images that are in memory have no record: their fingerprint is of every pixel."""
    assert take(ImageIndex.from_pixels("x", torch.zeros(2, 4, 4, 3, dtype=torch.uint8).numpy())) is None
