"""A disk that is full when a command other than `train` writes: evaluation, export, pictures, caches, reports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.cli import main
from fastmoco.commands import eval as eval_module
from fastmoco.commands import sweep as sweep_module
from fastmoco.errors import DivergedError, ExitCode
from fastmoco.evaluation.cache import FeatureCache
from fastmoco.run.directory import read_status
from fastmoco.tuning import cache as tuning_cache
from fastmoco.tuning.candidates import Candidate
from tests.commands.test_cli import TINY as SMALL
from tests.small_disk import fill, small_disk
from tests.sweep.test_sweep import FakeTraining

TINY = [*SMALL, "--cpu-threads", "1"]

CPU = torch.device("cpu")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        yield disk


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of thirty noisy images: a picture of them takes more than a page."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def failed(capsys: pytest.CaptureFixture[str], arguments: list[str], code: ExitCode = ExitCode.CHECKPOINT) -> str:
    """Run a command that fails with an exit code, and return its one line."""
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_an_export_to_a_full_disk(shapes_run: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export that does not fit names its file and the bytes it needs, and leaves the earlier export as it was."""
    path = disk / "backbone.safetensors"
    path.write_text("earlier")
    fill(disk, leave_bytes=8192)
    error = failed(capsys, ["export", str(shapes_run), "--to", "safetensors", "-o", str(path), "--overwrite"])
    assert f"cannot write {path} (No space left on device: " in error
    assert "bytes are needed and 8,192 bytes are free" in error
    assert names(disk) == {"filler", "backbone.safetensors"}
    assert path.read_text() == "earlier"


@pytest.mark.parametrize("compare", [[], ["--compare", "torch,resident"]])
def test_a_picture_of_views_on_a_full_disk(
    compare: list[str], photos: Path, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture that does not fit is named, and nothing is left of it."""
    path = disk / "v.png"
    fill(disk, leave_bytes=4096)
    cache = ["--device", "cpu", "--data-root", str(tmp_path / "cache")]
    error = failed(capsys, ["views", str(photos), "-o", str(path), "--crop-size", "32", *compare, *cache])
    assert f"cannot write {path} (No space left on device: " in error
    assert names(disk) == {"filler"}


@pytest.mark.parametrize(
    ("writer", "file"),
    [
        ("write_confusion", "confusion-knn.csv"),
        ("draw_confusion", "confusion-knn.png"),
        ("_draw_neighbours", "retrieval.png"),
        ("embedding_plot.draw", "feature_map.png"),
        ("Record.write", "eval.json"),
    ],
)
def test_an_evaluation_on_a_full_disk(
    writer: str,
    file: str,
    shapes_run: Path,
    photos: Path,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whichever file of an evaluation does not fit is named; those before it are whole, and nothing is left of it."""
    part, _, name = writer.rpartition(".")
    owner: Any = getattr(eval_module, part) if part else eval_module
    original = getattr(owner, name)

    def full(*arguments: Any, **named: Any) -> Any:
        fill(disk)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, full)
    monkeypatch.setattr(
        eval_module.embedding_plot, "project", lambda features, *_: features[:, :2].cpu().numpy()
    )  # t-SNE takes a second
    arguments = ["--data", str(photos), "--probes", "knn", "--no-feature-cache", "--device", "cpu"]
    arguments += ["--cpu-threads", "1", "--workers", "0", "--data-root", str(tmp_path / "cache")]
    error = failed(capsys, ["eval", str(shapes_run), *arguments, "--out", str(disk / "out")])
    assert f"cannot write {disk}/out/{file} (No space left on device: " in error
    assert file not in names(disk / "out")
    for path in (disk / "out").iterdir():
        assert path.suffix in (".csv", ".png", ".json")
        assert path.stat().st_size > 10


def test_the_feature_cache_on_a_full_disk(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that do not fit are not cached, with a warning, and nothing is left of them."""
    cache, features = FeatureCache(disk / "features"), torch.rand(1000, 64)
    fill(disk, leave_bytes=2**17)
    for _ in range(2):  # known in advance; during the write
        warning = cache.store("entry", features)
        assert warning is not None
        assert "256,000 bytes" in warning or "No space left" in warning
        assert names(disk / "features") == set()
        monkeypatch.setattr("fastmoco.evaluation.cache._MAX_SHARE_OF_FREE", 100)
        monkeypatch.setattr("pipelines.files._check_free_space", lambda *_: None)
    assert cache.load("entry", 1000, 64, CPU) is None


def test_the_tuning_cache_on_a_full_disk(disk: Path) -> None:
    """A choice that cannot be remembered leaves those from before."""
    path, choice = disk / "tuning.json", Candidate(amp="fp32")
    tuning_cache.store(path, "first", choice, {})
    fill(disk)
    with pytest.raises(OSError, match=r"No space left on device: .* bytes are needed and 0 bytes are free"):
        tuning_cache.store(path, "second", choice, {})
    assert names(disk) == {"filler", "tuning.json"}
    assert tuning_cache.load(path, "first") == choice


@pytest.mark.parametrize("diverges", [False, True])
def test_the_results_of_a_sweep_on_a_full_disk(
    diverges: bool, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results of a sweep that do not fit are printed, and the file is named; an error of a run comes first."""
    second = RuntimeError("the error of a run") if diverges else DivergedError("not finite")
    training = FakeTraining({"moco-m=0.9": second})

    def train(config: Any, _: Any, from_recipe: frozenset[str]) -> None:
        try:
            training.train(config, from_recipe)
        finally:
            if config.model.moco_m:
                fill(disk)

    monkeypatch.setattr("fastmoco.trainer.train", train)
    arguments = ["--vary", "moco-m=0,0.9", "--out", str(disk / "sweep")]
    if diverges:
        with pytest.raises(RuntimeError, match="the error of a run"):
            sweep_module.sweep_command(arguments)
    else:
        assert main(["sweep", *arguments]) == ExitCode.CHECKPOINT
    output, error = capsys.readouterr()
    assert output.splitlines()[-1 - diverges].split()[0] == "0.9" or "moco-m" in output
    assert "sweep.json (No space left on device: " in (output if diverges else error)
    assert names(disk / "sweep") == {"moco-m=0", "moco-m=0.9"}


def test_a_scan_to_a_full_disk(photos: Path, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A manifest that does not fit is an error of the data, and names its file."""
    fill(disk)
    error = failed(capsys, ["scan", str(photos), "--out", str(disk / "m.npz")], ExitCode.DATA)
    assert f"cannot write {disk}/m.npz (No space left on device" in error
    assert names(disk) == {"filler"}


DOCTOR = ["doctor", "--json", "--only", "machine", "--device", "cpu"]


@pytest.mark.parametrize("command", [["recipes"], pytest.param(DOCTOR, marks=pytest.mark.slow)])
def test_printing_to_a_file_on_a_full_disk(command: list[str]) -> None:
    """A report that is redirected to a full disk is an error of one line, not a report that ends in the middle."""
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "fastmoco", *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode == ExitCode.CHECKPOINT, process.stderr
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("fastmoco: ")]
    assert line == "fastmoco: error: cannot write the output (No space left on device): free space"
    assert "Traceback" not in process.stderr
    assert "Exception" not in process.stderr


def test_a_log_on_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose output goes to a full disk trains to the end, and its exit code is that of the run."""
    for arguments, code in ([], ExitCode.DONE), (["--epochs", "0"], ExitCode.CONFIG):
        with open("/dev/full", "w") as output, open("/dev/full", "w") as errors, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            patch.setattr(sys, "stderr", errors)
            assert main(["train", *TINY, "--out", str(tmp_path / "run"), *arguments]) == code
    assert read_status(tmp_path / "run")["exit_code"] == ExitCode.DONE


def test_the_error_file_of_torchrun_on_a_full_disk(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank whose error file does not fit on the disk still ends with its own line and exit code."""
    fill(disk)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(disk / "error.json"))
    error = failed(capsys, ["train", "--epochs", "0"], ExitCode.CONFIG)
    assert "--epochs is 0" in error
    assert names(disk) == {"filler"}
