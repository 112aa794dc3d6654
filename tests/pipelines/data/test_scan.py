"""A scan finds bad files before training, summarises the data, and saves training from opening files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from pipelines.data import headers, manifest
from pipelines.data.dataset import find_files, load_dataset
from pipelines.data.decoding import Decoding
from pipelines.data.manifest import FILE_NAME, ScanManifest
from pipelines.data.scan import duplicates, mean_and_std, scan
from pipelines.errors import DataError
from tests.oddities import bad_files, encode, fill, good_files, picture, write_files


def scanned(folder: Path, workers: int = 0) -> ScanManifest:
    files = find_files(str(folder), data_root=folder.parent)
    return scan(files.train.paths, files.test.paths if files.test else (), workers)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs `fastmoco scan`: exit code, standard output and standard error, with `cache` as --data-root."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["scan", *map(str, arguments), "--workers", "0", "--data-root", str(tmp_path / "cache")])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


@pytest.fixture
def load(tmp_path):
    return lambda folder, **options: load_dataset(str(folder), data_root=tmp_path / "cache", **options)


@pytest.fixture
def no_header_reads(monkeypatch):
    """Fails if an image file is opened for its size."""

    def refuse(path, *_):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(headers, "inspect_header", refuse)


# The result


def test_every_odd_and_every_bad_file(tmp_path):
    """The whole corpus: decoded sizes, stored kinds, the reasons that training would report, and no crash."""
    good, bad = good_files(), bad_files()
    write_files(tmp_path / "f", good)
    write_files(tmp_path / "f", bad)
    (tmp_path / "f" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "f" / "loop").symlink_to(tmp_path / "f")
    result = scanned(tmp_path / "f")
    row = {os.path.basename(path): i for i, path in enumerate(result.paths)}
    assert set(row) == {file.name for file in (*good, *bad)} | {"gone.png"}
    for file in good:
        assert tuple(result.sizes[row[file.name]]) == file.pixels.shape[:2], file.name
    reasons = dict(result.bad)
    assert set(reasons) == {row[file.name] for file in bad} | {row["gone.png"]}
    for file in bad:
        assert f"{file.name} is not a usable image" in reasons[row[file.name]]
        assert "\n" not in reasons[row[file.name]]
    assert "No such file" in reasons[row["gone.png"]]
    for name, kind in [("cmyk.jpeg", "JPEG CMYK"), ("gif-inside.jpg", "GIF"), ("grey.png", "PNG L"), ("empty.jpg", "")]:
        assert result.kind_names[result.kinds[row[name]]].startswith(kind)


def test_statistics_are_of_the_training_pixels(tmp_path):
    images = {"train/a/1.png": picture(), "train/b/2.png": picture(7, 5) // 3, "val/a/3.png": picture() * 0}
    for name, pixels in images.items():
        fill(tmp_path / "f", name)
        (tmp_path / "f" / name).write_bytes(encode(pixels, "PNG"))
    fill(tmp_path / "f", "val/b/4.png")
    result = scanned(tmp_path / "f")
    pixels = np.concatenate([images[name].reshape(-1, 3) for name in images if name.startswith("train")]) / 255
    mean, std = mean_and_std(result.histogram)
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=1e-12)
    assert result.training.tolist() == [True, True, False, False]


def test_duplicates_are_byte_for_byte(tmp_path):
    folder = fill(tmp_path / "f", "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    shutil.copy(folder / "train/a/1.png", folder / "train/b/copy.png")
    shutil.copy(folder / "train/b/2.png", folder / "val/b/leak.png")
    Image.open(folder / "val/a/3.png").save(folder / "val/a/again.png", compress_level=0)
    for name in ("x.png", "y.png"):
        (folder / "train/a" / name).write_bytes(b"")  # identical, but not images
    result = scanned(folder)
    groups = [[os.path.relpath(result.paths[i], folder) for i in group] for group in duplicates(result)]
    assert groups == [["train/a/1.png", "train/b/copy.png"], ["train/b/2.png", "val/b/leak.png"]]


@pytest.mark.slow  # processes start
def test_processes_give_the_same_result(tmp_path):
    folder = fill(tmp_path / "f", *(f"{i}.png" for i in range(150)))
    write_files(folder, bad_files()[:3])
    serial, parallel = scanned(folder), scanned(folder, workers=2)
    for name in ("stats", "sizes", "kinds", "digests", "training", "histogram"):
        np.testing.assert_array_equal(getattr(serial, name), getattr(parallel, name))
    assert (serial.paths, serial.kind_names, serial.bad) == (parallel.paths, parallel.kind_names, parallel.bad)


@pytest.mark.slow  # processes start
def test_a_process_that_dies_ends_the_scan(tmp_path):
    """A decoder that crashes its process: one line, exit code 3, no hang."""
    folder = fill(tmp_path / "f", "1.png", "2.png")
    script = tmp_path / "crash.py"
    script.write_text(
        "import os, sys\n"
        "from fastmoco.cli import main\n"
        "import pipelines.data.scan\n"
        "pipelines.data.scan._scan_file = lambda path, decoding: os.kill(os.getpid(), 9)\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main(['scan', sys.argv[1], '--workers', '1']))\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == ExitCode.DATA, done.stderr
    assert "a process that reads images died, at " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / FILE_NAME).exists()


# Use by training


@pytest.mark.parametrize("layout", ["classes", "flat", "splits", "list"])
def test_training_starts_without_opening_a_file(tmp_path, run, load, no_header_reads, layout):
    names = {
        "classes": ("a/1.png", "b/1.png", "b/2.png"),
        "flat": ("1.png", "2.png", "3.png", os.fsdecode(b"caf\xe9.png"), "new\nline.png"),
        "splits": ("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"),
        "list": ("b.png", "a.png"),
    }[layout]
    data = folder = fill(tmp_path / "f", *names)
    if layout == "list":
        data = tmp_path / "f" / "list.txt"
        data.write_text(f"b.png\na.png\n{fill(tmp_path / 'g', 'c.png')}/c.png\nb.png\n")
    code, output, _ = run(data)
    assert code == ExitCode.DONE
    assert str(manifest.places(str(data), tmp_path)[0]) in output
    dataset = load(data)
    assert dataset.indexing == "as scanned"
    assert (dataset.train.sizes == (4, 3)).all()
    assert len(dataset.train) == {"classes": 3, "flat": 5, "splits": 2, "list": 4}[layout]
    assert (dataset.test is not None) == (layout == "splits")
    if layout == "classes":  # the whole folder may move
        folder.rename(tmp_path / "moved")
        assert load(tmp_path / "moved").indexing == "as scanned"


def test_only_what_has_changed_is_read_again(tmp_path, run, load, monkeypatch):
    folder = fill(tmp_path / "f", *(f"{i}.png" for i in range(5)))
    run(folder)
    (folder / "1.png").write_bytes(encode(picture(9, 8), "PNG"))
    (folder / "2.png").unlink()
    os.utime(folder / "3.png", ns=(0, 0))
    fill(folder, "5.png")
    opened, read = [], headers.inspect_header
    monkeypatch.setattr(
        headers, "inspect_header", lambda path, *how: (opened.append(os.path.basename(path)), read(path, *how))[1]
    )
    dataset = load(folder)
    assert sorted(opened) == ["1.png", "3.png", "5.png"]
    assert dataset.indexing == "as scanned, but for 3 new or changed files"
    assert dataset.train.sizes.tolist() == [[4, 3], [9, 8], [4, 3], [4, 3], [4, 3]]


def test_a_file_that_fails_only_on_decoding_is_left_out_of_training(tmp_path, run, load):
    """A PNG with a flipped bit has a valid header: without a scan, it would fail during training."""
    folder = fill(tmp_path / "f", *(f"{i}.png" for i in range(20)))
    write_files(folder, [bad for bad in bad_files() if bad.name == "bit-flipped.png"])
    assert len(load(folder).train) == 21
    code, output, error = run(folder)
    assert code == ExitCode.DATA
    assert "bit-flipped.png is not a usable image" in output
    assert "1 of 21 images are bad" in error
    assert run(folder, "--bad-images", "quarantine")[0] == ExitCode.DONE
    with pytest.raises(DataError, match=r"1 of 21 images of f are bad; .*bit-flipped\.png is not a usable image"):
        load(folder)
    shutil.copytree(folder, tmp_path / "copy")  # keeps modification times
    for data in (folder, tmp_path / "copy"):
        dataset = load(data, bad_images="quarantine")
        assert len(dataset.train) == 20
        ((path, reason),) = dataset.quarantine
        assert path == str(data / "bit-flipped.png")
        assert reason.startswith(path)
    (folder / "bit-flipped.png").write_bytes(encode(picture(), "PNG"))  # fixed
    assert len(load(folder).train) == 21


def test_too_many_bad_files_are_reported_even_if_some_may_be_left_out(tmp_path, run):
    folder = fill(tmp_path / "f", *(f"{i}.png" for i in range(8)))
    write_files(folder, bad_files()[:12])
    code, output, error = run(folder, "--bad-images", "quarantine")
    assert code == ExitCode.DATA
    assert "12 of 20 images of f are bad, and at most 10% may be left out" in error
    assert output.count("is not a usable image") == 10
    assert "... and 2 more bad files" in output


# Output and manifest file


def test_the_summary(tmp_path, run):
    folder = fill(tmp_path / "pets", "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png", "val/b/notes.txt")
    shutil.copy(folder / "train/b/2.png", folder / "val/b/2.png")
    code, output, _ = run(folder)
    assert code == ExitCode.DONE
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "images 5 files, 0.0 MiB (pets/train 2, pets/val 3)" in lines
    assert "passed over 1 file: 1 .txt" in lines
    assert "labels 2 classes (the folders in train)" in lines
    assert "size 3×4 pixels (width×height, all the same)" in lines
    assert "formats PNG RGB 5" in lines
    assert "duplicates 1 copy of 1 image (1 of them both to train and to test on)" in lines
    assert any(line.startswith("mean 0.") for line in lines)


def test_where_it_is_saved(tmp_path, run, load):
    folder = fill(tmp_path / "f", "1.png")
    out = tmp_path / "out" / "m.npz"
    assert run(folder, "--out", out)[0] == ExitCode.DONE
    assert out.is_file()
    assert not (folder / FILE_NAME).exists()
    (folder / (FILE_NAME + ".tmp")).mkdir()  # prevents writing, like a read-only folder
    code, output, _ = run(folder)
    assert code == ExitCode.DONE
    assert str(tmp_path / "cache" / "manifests") in output
    assert load(folder).indexing == "as scanned"
    code, _, error = run(folder, "--out", "/dev/null/m.npz")
    assert (code, "cannot write /dev/null/m.npz (" in error) == (ExitCode.CONFIG, True)
    assert run(folder, "--out", tmp_path / "m.json")[0] == ExitCode.CONFIG


def test_a_full_disk_leaves_the_old_manifest(tmp_path, monkeypatch):
    folder = fill(tmp_path / "f", "1.png")
    result, path = scanned(folder), tmp_path / "m.npz"
    manifest.write(result, path, str(folder))
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        manifest.write(result, path, str(folder))
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"f", "m.npz"}


def test_damage_is_refused_in_one_line(tmp_path):
    """Flips bits in every 31st byte, one at a time: the manifest is refused or unchanged."""
    folder = fill(tmp_path / "f", "1.png", "2.png")
    result, path = scanned(folder), tmp_path / "m.npz"
    manifest.write(result, path, str(folder))
    content = path.read_bytes()
    messages = []
    for at in range(0, len(content), 31):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
        try:
            read = manifest.read(path, str(folder))
        except DataError as error:
            messages.append(str(error))
            continue
        assert read.paths == result.paths
        np.testing.assert_array_equal(read.sizes, result.sizes)
        np.testing.assert_array_equal(read.stats, result.stats)
    assert len(messages) > len(content) / 31 / 2
    assert all("m.npz is not a usable manifest (" in message and "\n" not in message for message in messages)
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="not a usable manifest"):
            manifest.read(path, str(folder))


@pytest.mark.parametrize("attack", ["a pickle", "a bomb", "another format", "too few sizes", "a huge claim"])
def test_hostile_manifests(tmp_path, attack):
    folder = fill(tmp_path / "f", "1.png", "2.png")
    path = tmp_path / "m.npz"
    manifest.write(scanned(folder), path, str(folder))
    with np.load(path) as columns:
        values = dict(columns)
    if attack == "a pickle":
        values["sizes"] = np.array([[print, print]], dtype=object)
        np.savez(path, allow_pickle=True, **values)
    elif attack == "a bomb":
        np.savez_compressed(path, **values)
    elif attack == "another format":
        about = json.loads(values["about"].tobytes()) | {"format": 99}
        values["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(path, allow_pickle=False, **values)
    elif attack == "too few sizes":
        values["sizes"] = values["sizes"][:1]
        np.savez(path, allow_pickle=False, **values)
    else:
        claim = b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'fortran_order': False, 'shape': (250000000000, 2), }"
        with zipfile.ZipFile(path, "w") as archive:
            for name in values:
                archive.writestr(f"{name}.npy", claim.ljust(127) + b"\n")
    with pytest.raises(DataError, match=r"not a usable manifest .*delete it, or run fastmoco scan"):
        manifest.read(path, str(folder))


def test_data_without_files_cannot_be_scanned(tmp_path, run):
    for data, message in [
        ("shapes", "drawn in memory"),
        ("cifar10", "one verified archive"),
        (tmp_path / "x.beton", "holds records"),
        (tmp_path / "nowhere", "does not exist"),
    ]:
        code, _, error = run(data)
        assert code == ExitCode.DATA
        assert message in error


def test_cifar_statistics(test_data):
    """The published mean of CIFAR-10's training images, from every 50th of them."""
    files = find_files(str(test_data / "cifar10"), data_root=test_data)
    result = scan(files.train.paths[::50], (), 0)
    mean, std = mean_and_std(result.histogram)
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=0.02)
    np.testing.assert_allclose(std, (0.247, 0.243, 0.262), atol=0.02)
    assert not result.bad


def test_a_rescan_finds_nothing_new_where_nothing_has_changed(tmp_path, run, load):
    """Also of a file that is missing, and with another value range, for which deep images are read again."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(11):
        Image.fromarray(np.full((9, 9), 1000 * i, np.uint16)).save(folder / f"{i:02}.png")
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    for _ in range(2):
        assert run(folder, "--bad-images", "quarantine")[0] == ExitCode.DONE
        assert load(folder, bad_images="quarantine").indexing == "as scanned"
    deep = load(folder, bad_images="quarantine", decoding=Decoding(value_range=(0, 4095)))
    assert (deep.indexing, len(deep.train)) == ("as scanned", 11)
    Image.new("L", (9, 9)).save(tmp_path / "nowhere.png")
    assert load(folder, bad_images="quarantine").indexing == "as scanned, but for 1 new or changed file"


def test_other_bands_are_one_line_and_another_number_of_channels_reads_all_again(tmp_path, run, load):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(12):
        np.save(folder / f"{i:02}.npy", np.full((9, 9, 4), 10 * i, np.uint8))
    code, out, err = run(folder)
    assert code == ExitCode.DATA
    assert "12 images of 4 bands, where --channels is 3: give --channels 4 (e.g. 00.npy)" in out + err
    with pytest.raises(DataError, match="have 4 bands, and --channels is 3: give --channels 4"):
        load(folder)
    assert len(load(folder, decoding=Decoding(channels=4)).train) == 12
    code, out, _ = run(folder, "--channels", "4")
    assert code == ExitCode.DONE
    assert "NPY HWC;uint8 12" in out
    known = manifest.find(str(folder), tmp_path)
    assert known is not None
    assert (known.decoding, known.histogram.shape) == (Decoding(channels=4), (4, 256))
