"""Time to accuracy: learning curves from metrics, archives of images, interrupted and failed runs."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import accuracy
from benchmarks.measure.archives import unpacked
from benchmarks.measure.learning_curve import Evaluation, Sessions, draw, evaluations, first_at
from fastmoco.errors import ConfigError
from fastmoco.run.metrics import read_metrics
from pipelines.data.dataset import load_dataset
from pipelines.errors import DataError

ROOT = Path(__file__).resolve().parents[2]

# 12 steps of 50 images per epoch: 600 images, which take 60 s at 10 images/s
METRICS = """\
{"step": 0, "epoch": 0, "knn_top1_percent": 20.0, "knn_pixels_top1_percent": 35.0}
{"step": 10, "epoch": 0, "loss": 6.0, "lr": 0.06, "images_per_s": 5.0, "data_wait_percent": 1.0}
{"step": 12, "epoch": 1, "loss": 6.0, "lr": 0.06, "images_per_s": 10.0, "data_wait_percent": 1.0}
{"step": 12, "epoch": 1, "knn_top1_percent": 34.0}
{"step": 24, "epoch": 2, "loss": 5.0, "lr": 0.03, "images_per_s": 10.0, "data_wait_percent": 1.0}
{"step": 24, "epoch": 2, "knn_top1_percent": 41.0}
{"step": 36, "epoch": 3, "loss": null, "lr": 0.01, "images_per_s": 20.0, "data_wait_percent": 1.0}
{"step": 36, "epoch": 3, "knn_top1_percent": 39.5}
"""


@pytest.fixture
def curve(tmp_path: Path) -> list[Evaluation]:
    (tmp_path / "metrics.jsonl").write_text(METRICS)
    return evaluations(read_metrics(tmp_path / "metrics.jsonl"), batch_size=50)


def test_only_training_minutes_count(curve: list[Evaluation]) -> None:
    first = (500 / 5 + 100 / 10) / 60
    assert [e.epoch for e in curve] == [0, 1, 2, 3]
    assert [e.training_minutes for e in curve] == pytest.approx([0, first, first + 1, first + 1.5])
    assert [e.knn_percent for e in curve] == [20.0, 34.0, 41.0, 39.5]


def test_the_accuracy_is_that_of_the_demo() -> None:
    """On the encoder's output, of which the published targets are."""
    records = [{"step": 0, "epoch": 0, "knn_top1_percent": 20.0, "knn_output_top1_percent": 18.0}]
    assert [e.knn_percent for e in evaluations(records, batch_size=50)] == [18.0]


def test_a_target_is_reached_at_the_first_evaluation_with_that_accuracy(curve: list[Evaluation]) -> None:
    at_35, at_41 = first_at(curve, 35.0), first_at(curve, 41.0)
    assert at_35 is not None
    assert at_41 is not None
    assert (at_35.epoch, at_41.epoch) == (2, 2)  # exactly 41 is enough
    assert first_at(curve, 41.1) is None
    assert first_at([], 1.0) is None


def test_the_median_is_reported_only_if_every_seed_reached_the_target(curve: list[Evaluation]) -> None:
    slow = [Evaluation(e.epoch, 3 * e.training_minutes, e.knn_percent - 2) for e in curve]
    runs = {0: {"evaluations": curve}, 1: {"evaluations": slow}}
    both, one = accuracy._reached(39.0, runs), accuracy._reached(40.0, runs)
    assert both["epochs"] == {0: 2, 1: 2}
    assert both["median_training_minutes"] == pytest.approx(2 * curve[2].training_minutes)  # of t and 3t
    assert one["epochs"] == {0: 2, 1: None}
    assert one["training_minutes"][1] is None
    assert (one["reached_by"], one["seeds"], one["median_training_minutes"]) == (1, 2, None)


def test_the_picture_has_a_panel_per_recipe(curve: list[Evaluation], tmp_path: Path) -> None:
    targets = {"cifar10-demo": (35.0, 80.0), "cifar10-demo-symmetric": (85.3,)}
    draw({"cifar10-demo": {0: curve}}, targets, tmp_path / "one.png")
    draw({"cifar10-demo": {0: curve, 1: curve}, "cifar10-demo-symmetric": {0: []}}, targets, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.height == one.height
        assert two.width > 1.8 * one.width


def test_a_session_that_was_killed_counts_until_its_last_write(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sessions, began = Sessions(run), time.time() - 1000
    (tmp_path / "run.sessions.json").write_text(json.dumps([{"began": began, "seconds": None}]))
    assert sessions.seconds() == [0.0]  # no metrics: nothing shows that it did anything
    (run / "metrics.jsonl").write_text(METRICS)
    os.utime(run / "metrics.jsonl", (began + 70, began + 70))
    assert sessions.seconds() == pytest.approx([70])
    with sessions.record():
        time.sleep(0.05)
    assert sessions.seconds() == pytest.approx([70, 0.05], abs=0.2)
    sessions.reset()
    assert sessions.seconds() == []


# ---- archives --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tar file with train and test, two classes of two images each, and an optional extra member."""

    def make(name: str = "images.tar.xz", folder: str = "", extra: tarfile.TarInfo | None = None) -> Path:
        png = io.BytesIO()
        Image.new("RGB", (32, 32), (200, 30, 30)).save(png, "PNG")
        path = tmp_path / name
        with tarfile.open(path, "w:xz" if name.endswith("xz") else "w") as archive:
            for member in (f"{s}/{c}/{n}.png" for s in ("train", "test") for c in ("cat", "dog") for n in range(2)):
                info = tarfile.TarInfo(folder + member)
                info.size = len(png.getvalue())
                archive.addfile(info, io.BytesIO(png.getvalue()))
            if extra is not None:
                archive.addfile(extra, io.BytesIO(bytes(extra.size)))
        return path

    return make


@pytest.mark.parametrize("folder", ["", "cifar10/"])
def test_an_archive_is_unpacked_once_and_trained_from(pack: Callable[..., Path], tmp_path: Path, folder: str) -> None:
    path = pack(folder=folder)
    folder_path = unpacked(str(path), tmp_path / "cache")
    assert folder_path is not None
    dataset = load_dataset(folder_path, data_root=tmp_path / "cache")
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.test), dataset.train.class_names) == (4, 4, ("cat", "dog"))
    before = os.stat(folder_path).st_ctime_ns
    assert unpacked(str(path), tmp_path / "cache") == folder_path
    assert os.stat(folder_path).st_ctime_ns == before
    assert len(list((tmp_path / "cache" / "unpacked").iterdir())) == 1


def test_paths_that_are_no_archives_are_returned_unchanged(tmp_path: Path) -> None:
    assert unpacked(None) is None
    assert unpacked("cifar10") == "cifar10"
    assert unpacked(str(tmp_path)) == str(tmp_path)


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = 8 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "hostile",
    [
        _member("../../evil.png"),
        _member("train/cat/evil.png", tarfile.SYMTYPE, "/etc/passwd"),
        _member("train/out", tarfile.SYMTYPE, "../../.."),
        _member("train/cat/hard.png", tarfile.LNKTYPE, "../../../../etc/passwd"),
        _member("train/cat/pipe.png", tarfile.FIFOTYPE),
        _member("train/cat/device.png", tarfile.CHRTYPE),
    ],
    ids=["outside", "link", "folder link", "hard link", "pipe", "device"],
)
def test_an_archive_with_a_hostile_member_is_refused(
    pack: Callable[..., Path], tmp_path: Path, hostile: tarfile.TarInfo
) -> None:
    path, cache = pack(extra=hostile), tmp_path / "deep" / "cache"
    with pytest.raises(DataError, match=r"images\.tar\.xz cannot be unpacked"):
        unpacked(str(path), cache)
    assert list((cache / "unpacked").iterdir()) == []
    assert not list(tmp_path.rglob("evil.png"))


@pytest.mark.parametrize("name", ["images.tar", "images.tar.xz"])
@pytest.mark.parametrize("kept", ["half", "members", "nothing"])
def test_an_archive_that_ends_early_is_refused(pack: Callable[..., Path], tmp_path: Path, name: str, kept: str) -> None:
    path = pack(name)
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset if name == "images.tar" else len(content) - 20
    path.write_bytes(content[: {"half": len(content) // 2, "members": third, "nothing": 0}[kept]])
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpacked(str(path), tmp_path / "cache")
    assert list((tmp_path / "cache" / "unpacked").iterdir()) == []


def test_a_missing_archive_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.tar cannot be unpacked .*No such file"):
        unpacked(str(tmp_path / "absent.tar"), tmp_path)


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (accuracy.Settings(recipes="cifar10-demo,imagenet"), "--recipes imagenet is unknown"),
        (accuracy.Settings(recipes=""), "--recipes is empty"),
        (accuracy.Settings(seeds="0,one"), "--seeds 0,one is not a list of numbers"),
        (accuracy.Settings(seeds="0.5"), "whole number"),
        (accuracy.Settings(targets="80;82"), "--targets 80;82"),
    ],
)
def test_invalid_settings_are_refused(settings: accuracy.Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        accuracy.main(settings, Console(file=io.StringIO()))


def test_the_runs_are_the_recipes_unless_made_smaller(tmp_path: Path) -> None:
    settings = accuracy.Settings(runs=tmp_path)
    config = accuracy._config(settings, "cifar10-demo-symmetric", 2, "cifar10")
    optim, model = config.optim, config.model
    assert (optim.batch_size, optim.lr, optim.wd, optim.epochs, optim.cos) == (512, 0.06, 5e-4, 200, True)
    assert (model.moco_k, model.moco_m, model.moco_t, model.bn_splits, model.symmetric) == (4096, 0.99, 0.1, 8, True)
    assert (config.run.seed, config.run.knn_k, config.run.knn_t) == (2, 200, 0.1)
    small = accuracy._config(replace(settings, batch_size=64, limit=1000), "cifar10-demo", 0, "cifar10")
    assert (small.optim.lr, small.model.moco_k, small.model.bn_splits) == (None, None, None)


@pytest.mark.slow
def test_a_stopped_invocation_reports_its_results_and_the_next_one_resumes(tmp_path: Path) -> None:
    """SIGTERM in the first of two runs; then the rest; then nothing to do; then other settings are refused."""
    flags = ["--quick", "--epochs", "4", "--limit", "128", "--device", "cpu", "--targets", "5,99.9"]
    flags += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    command, environment = [sys.executable, "benchmarks/accuracy.py", *flags], {**os.environ, "OMP_NUM_THREADS": "1"}
    run = tmp_path / "runs" / "cifar10-demo-4ep-seed0"
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() or len(read_metrics(run / "metrics.jsonl")) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output[-2000:]
    partial = json.loads((tmp_path / "accuracy.json").read_text())["recipes"]
    assert partial["cifar10-demo"]["runs"]["0"]["state"] == "preempted"
    assert partial["cifar10-demo"]["runs"]["0"]["final_percent"] is None
    assert partial["cifar10-demo-symmetric"]["runs"]["0"]["state"] == "not begun"
    assert "not begun" in output

    settings = accuracy.Settings(
        quick=True, epochs=4, limit=128, device="cpu", targets="5,99.9", runs=tmp_path / "runs", out=tmp_path
    )
    accuracy.main(settings, Console(file=io.StringIO(), width=150))
    result = json.loads((tmp_path / "accuracy.json").read_text())["recipes"]
    for name, sessions in (("cifar10-demo", 2), ("cifar10-demo-symmetric", 1)):
        one = result[name]["runs"]["0"]
        assert (one["state"], one["sessions"]) == ("done", sessions)
        assert [epoch for epoch, _, _ in one["evaluations"]] == [0, 1, 2, 3, 4]
        minutes = [minutes for _, minutes, _ in one["evaluations"]]
        assert minutes == sorted(minutes)
        assert 0 < one["training_minutes"] == minutes[-1] < one["wall_minutes"]
        assert one["final_percent"] == one["evaluations"][-1][2] <= one["best_percent"]
        easy, impossible = result[name]["targets"]
        assert (easy["reached_by"], easy["epochs"]["0"]) == (1, 0)
        assert (impossible["reached_by"], impossible["median_training_minutes"]) == (0, None)
        assert impossible["epochs"] == {"0": None}
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000

    written = (run / "metrics.jsonl").stat().st_mtime_ns
    file = io.StringIO()
    accuracy.main(settings, Console(file=file, width=150))
    assert (run / "metrics.jsonl").stat().st_mtime_ns == written
    assert "done before" in file.getvalue()
    assert "not reached" in file.getvalue()
    with pytest.raises(ConfigError, match=r"limit 128, and 64 was requested: choose another folder with --runs"):
        accuracy.main(replace(settings, limit=64), Console(file=io.StringIO(), width=150))


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    run = tmp_path / "cifar10-demo-1ep-seed0"
    settings = accuracy.Settings(
        quick=True, recipes="cifar10-demo", epochs=1, limit=64, device="cpu", targets="10", runs=tmp_path
    )
    accuracy.main(settings, Console(file=io.StringIO(), width=150))
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.unlink()
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running", "exit_code": None}))
    result = accuracy.main(settings, Console(file=io.StringIO(), width=150))
    one = result["recipes"]["cifar10-demo"]["runs"][0]
    assert (one["state"], one["sessions"]) == ("done", 1)
    assert [e.epoch for e in one["evaluations"]] == [0, 1]
