"""metrics.jsonl that is not what a run wrote: a folder, a pipe, or lines with other values."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fastmoco.cli import main
from fastmoco.errors import CheckpointError, ExitCode
from fastmoco.run.directory import read_status
from fastmoco.run.metrics import MetricsWriter, read_metrics
from tests.commands.test_cli import TINY as SMALL

TINY = [*SMALL, "--cpu-threads", "1"]

DAMAGED = [
    '{"step": 1, "epoch": 0, "loss": "high"}',
    '{"step": 1, "epoch": 0, "loss": [2.5]}',
    '{"step": 1, "epoch": 0, "loss": true}',
    '{"step": 1, "epoch": 0, "loss": 1' + "0" * 400 + "}",
    '{"step": "1", "epoch": 0}',
    '{"step": 1.5, "epoch": 0}',
    '{"step": true, "epoch": 0}',
    '{"epoch": 0}',
    "[1, 2]",
    "\\ud800",
    "",
]


SWEEP = ["sweep", "shapes", *TINY, "--vary", "moco-m=0.9"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of one run."""
    out = tmp_path_factory.mktemp("runs") / "sweep"
    assert main([*SWEEP, "--out", str(out)]) == ExitCode.DONE
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The folder of that run, in a copy of the sweep."""
    return Path(shutil.copytree(finished, tmp_path / "sweep")) / "moco-m=0.9"


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("happens", [folder, pipe])
def test_metrics_that_are_no_file_are_one_line(happens, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose metrics.jsonl is a folder or a pipe is not resumed, and the line names it."""
    happens(run / "metrics.jsonl")
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(run)]) == ExitCode.CHECKPOINT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{run}/metrics.jsonl" in error
    assert read_status(run)["state"] == "failed"


@pytest.mark.parametrize("line", DAMAGED)
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    """A line of metrics.jsonl with anything but numbers is named, and is left out of a run that is resumed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0, "loss": 2.5}\n' + line + '\n{"step": 2, "epoch": 0, "loss": NaN}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2 is not valid: delete that line"):
        read_metrics(path)
    assert MetricsWriter(tmp_path, tensorboard=False).truncate_after(2) == 1
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_run_with_a_damaged_line_is_resumed_with_a_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with a damaged line in metrics.jsonl is resumed without it, and a warning says so."""
    path = run / "metrics.jsonl"
    lines = path.read_text().count("\n")
    path.write_text(path.read_text() + DAMAGED[0] + "\n")
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(run)]) == ExitCode.DONE
    assert "metrics.jsonl: 1 line was damaged, and is left out" in capsys.readouterr().out
    assert len(read_metrics(path)) == lines


def test_a_sweep_names_the_line_that_is_no_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep that reads a finished run with a damaged line ends with the file and the number of the line."""
    path = run / "metrics.jsonl"
    number = path.read_text().count("\n") + 1
    path.write_text(path.read_text() + DAMAGED[0] + "\n")
    capsys.readouterr()
    assert main([*SWEEP, "--out", str(run.parent)]) == ExitCode.CHECKPOINT
    assert capsys.readouterr().err == (
        f"fastmoco: error: {path} line {number} is not valid: delete that line to read the others\n"
    )


def test_a_status_with_other_values_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep refuses a status.json that no run wrote."""
    (run / "status.json").write_text('{"state": "done", "exit_code": [], "step": 1, "versions": {}}')
    capsys.readouterr()
    assert main([*SWEEP, "--out", str(run.parent)]) == ExitCode.CONFIG
    assert capsys.readouterr().err == f"fastmoco: error: {run}/status.json was not written by a run\n"
