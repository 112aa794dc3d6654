"""Resuming with other settings, images or libraries: refused with the difference, or allowed by a flag and said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fastmoco.run.state
from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run import checkpoint
from tests.oddities import encode, picture
from tests.run.test_train import RESIDENT, assert_same_run, trained

QUICK = [*RESIDENT, "--knn-every", "0", "--no-tensorboard", "--cpu-threads", "1", "--check", "off", "--log-every", "1"]
ONE = ["--epochs", "1"]


def train(out: Path, *flags: str | Path) -> int:
    return main(["train", *QUICK, "--out", str(out), *map(str, flags)])


def test_more_epochs_need_no_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run goes on for more epochs, which is said; with --schedule it equals one planned so, bit for bit."""
    run = tmp_path / "run"
    assert train(run, *ONE, "--schedule", "3") == ExitCode.DONE
    capsys.readouterr()
    assert train(run, "--epochs", "2", "--schedule", "3", "--resume") == ExitCode.DONE
    assert capsys.readouterr().out.count("extended from 1 to 2 epochs: the learning rate at step 4 is") == 1
    assert_same_run(run, trained(tmp_path / "whole", "--epochs", "2", "--schedule", "3", settings=QUICK))


def test_every_changed_setting_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All settings that differ are named, with the flag that allows them; one that does not exist is refused."""
    run = tmp_path / "run"
    assert train(run, *ONE) == ExitCode.DONE
    capsys.readouterr()
    assert train(run, *ONE, "--resume", "--moco-t", "0.5", "--wd", "0", "--allow-changed", "wd") == ExitCode.CHECKPOINT
    (line,) = capsys.readouterr().err.splitlines()
    assert "moco_t is 0.5 and was 0.1; wd is 0.0 and was 0.0005" in line
    assert line.endswith("--allow-changed moco-t wd")
    assert train(run, *ONE, "--resume", "--allow-changed", "epoch") == ExitCode.CONFIG
    assert "did you mean 'epochs'?" in capsys.readouterr().err
    assert train(run, *ONE, "--resume", "--width", "0.25", "--allow-changed", "width") == ExitCode.CHECKPOINT
    assert "belongs to another model" in capsys.readouterr().err


def test_fewer_epochs_than_done_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run cannot be resumed to end before its checkpoint."""
    run = tmp_path / "run"
    assert train(run, "--epochs", "2") == ExitCode.DONE
    capsys.readouterr()
    assert train(run, *ONE, "--resume") == ExitCode.CHECKPOINT
    (line,) = capsys.readouterr().err.splitlines()
    assert "is from step 8, and --epochs 1 are 4 steps" in line


def test_changed_images_need_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resuming on other images is refused with exit code 3 and the flag that allows it; with that, it is said."""
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for i in range(40):
        (photos / f"{i:02}.jpg").write_bytes(encode(np.roll(picture(24, 24), i, axis=1), "JPEG", quality=90))
    assert train(run, *ONE, "--data", photos, "--limit", "40") == ExitCode.DONE
    (photos / "39.jpg").unlink()
    (photos / "40.jpg").write_bytes(encode(picture(30, 20), "JPEG", quality=90))
    capsys.readouterr()
    more = ["--data", photos, "--limit", "40", "--epochs", "2", "--resume"]
    assert train(run, *more) == ExitCode.DATA
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--allow-changed-data")
    assert train(run, *more, "--allow-changed-data") == ExitCode.DONE
    assert "resumed although the images have other sizes in pixels" in capsys.readouterr().out


def test_quarantine_may_begin_on_resume(tmp_path: Path) -> None:
    """A run that stopped at a bad image resumes with --bad-images quarantine, without another flag."""
    assert train(tmp_path / "run", *ONE) == ExitCode.DONE
    assert train(tmp_path / "run", *ONE, "--resume", "--bad-images", "quarantine") == ExitCode.DONE
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["bad_images"] == "quarantine"


def test_other_versions_are_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming under other library versions goes on, and says so in one line."""
    assert train(tmp_path / "run", *ONE) == ExitCode.DONE
    (path, *_) = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"), reverse=True)
    before = checkpoint.verify(path)["versions"]
    monkeypatch.setattr(fastmoco.run.state, "versions", lambda: before | {"torch": "9.9", "numpy": "8.8"})
    capsys.readouterr()
    assert train(tmp_path / "run", *ONE, "--resume") == ExitCode.DONE
    lines = [line for line in capsys.readouterr().out.splitlines() if "although" in line]
    assert lines == [f"resumed although torch is 9.9 and was {before['torch']}, numpy is 8.8 and was {before['numpy']}"]
