"""A disk that fills up under a run: each of its files, on a real small disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.run import recorder
from fastmoco.run.directory import RunDirectory, read_status
from fastmoco.run.metrics import MetricsWriter, read_metrics
from fastmoco.run.recorder import RunRecorder
from fastmoco.trainer import Trainer
from pipelines.backends.two_view import TwoViewPipeline
from tests.run.test_train import RESIDENT
from tests.small_disk import fill, small_disk

ONE_EPOCH = [*RESIDENT, "--cpu-threads", "1", "--epochs", "1", "--knn-every", "0", "--keep-checkpoints", "1"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MiB: a run of `ONE_EPOCH` takes 5."""
    with small_disk(tmp_path / "disk", 12 * 2**20) as disk:
        yield disk


@pytest.fixture
def train(disk: Path, capsys: pytest.CaptureFixture[str]):
    """Train in DISK/run; returns the exit code and the line of the error, after it was checked to be one line."""

    def call(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["train", *ONE_EPOCH, "--no-tensorboard", *arguments, "--out", str(disk / "run")])
        error = capsys.readouterr().err
        assert error.count("\n") == (code != ExitCode.DONE), error
        assert not list(disk.rglob("*.tmp"))
        return code, error

    return call


def fill_before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, disk: Path, leave_bytes: int = 0) -> None:
    """Fill the disk when a function is called for the first time, by a program that leaves a file behind."""
    original = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        if not (disk / "filler").exists():
            fill(disk, leave_bytes)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, call)


def assert_failed(run: Path) -> None:
    status = read_status(run)
    assert (status["state"], status["exit_code"]) == ("failed", ExitCode.CHECKPOINT)


def test_a_run_that_finds_the_disk_full_writes_nothing_and_can_be_repeated(train, disk: Path) -> None:
    """A run that cannot write its first file names it, and the same command works once there is space."""
    filler = fill(disk)
    code, error = train()
    assert code == ExitCode.CHECKPOINT
    assert "run/config.json (No space left on device: " in error
    assert "bytes are needed and 0 bytes are free)" in error
    assert {path.name for path in (disk / "run").iterdir()} == {".lock"}
    filler.unlink()
    assert train()[0] == ExitCode.DONE


@pytest.mark.parametrize(
    ("owner", "name", "file"),
    [
        (recorder, "views_grid", "views.png"),
        (RunRecorder, "finish", "backbone.safetensors"),
        (recorder, "curves", "curves.png"),
    ],
)
def test_a_disk_that_fills_up_before_a_file_of_the_run(
    owner: Any, name: str, file: str, train, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file of a run meets a full disk is named with the bytes it needs, and status.json says "failed"."""
    with monkeypatch.context() as patch:
        fill_before(patch, owner, name, disk)
        code, error = train()
    assert code == ExitCode.CHECKPOINT
    assert f"cannot write {disk}/run/{file} (No space left on device: " in error
    assert_failed(disk / "run")
    assert not (disk / "run" / file).exists()
    (disk / "filler").unlink()
    if name != "views_grid":  # there is a checkpoint
        assert train("--resume")[0] == ExitCode.DONE
        assert (disk / "run" / file).stat().st_size > 1000


def test_the_first_error_of_a_full_disk_wins_and_everything_is_closed(
    train, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If checkpoint and metrics both meet a full disk, the error is that of the checkpoint, and the pipeline is closed.

    The checkpoint from before stays.
    """
    closed, close = [], TwoViewPipeline.close
    with monkeypatch.context() as patch:
        patch.setattr(TwoViewPipeline, "close", lambda self: (closed.append(self), close(self)))
        fill_before(patch, Trainer, "_steps", disk)
        code, error = train("--log-every", "1")
    assert code == ExitCode.CHECKPOINT
    assert "a checkpoint needs" in error
    assert closed
    assert_failed(disk / "run")
    assert [path.name for path in (disk / "run" / "checkpoints").glob("*.safetensors")] == [
        "step-000000000.safetensors"
    ]


def test_resuming_without_a_free_byte(train, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed on a full disk ends with one line, and resumes once there is space."""
    with monkeypatch.context() as patch:
        fill_before(patch, Trainer, "_steps", disk)
        train()
    (disk / "filler").unlink()
    fill(disk)
    code, error = train("--resume", "--log-every", "1")
    assert code == ExitCode.CHECKPOINT
    assert "No space left" in error or "bytes free" in error
    assert_failed(disk / "run")
    (disk / "filler").unlink()
    assert train("--resume")[0] == ExitCode.DONE
    assert read_status(disk / "run")["state"] == "done"


def test_damaged_metrics_cannot_be_rewritten_on_a_full_disk(train, disk: Path) -> None:
    """If a resumed run has no space to rewrite its metrics, the line names metrics.jsonl, which stays as it was."""
    assert train()[0] == ExitCode.DONE
    metrics = disk / "run" / "metrics.jsonl"
    content = metrics.read_bytes() + b'{"step": 99, "epoch": 1}\n'
    metrics.write_bytes(content)
    fill(disk)
    code, error = train("--resume")
    assert code == ExitCode.CHECKPOINT
    assert "metrics.jsonl" in error
    assert metrics.read_bytes() == content
    assert_failed(disk / "run")


def test_the_last_status_has_space_reserved_for_it(disk: Path) -> None:
    """On a full disk, status.json can still say how the run ended."""
    run = RunDirectory.open(disk / "run")
    run.write_status(step=1, epoch=0)
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        run.write_status(step=2, epoch=0)
    assert read_status(run.path)["step"] == 1
    run.write_status(step=2, epoch=0, exit_code=ExitCode.DIVERGED, message="x" * 5000)
    run.close()
    assert read_status(run.path)["exit_code"] == ExitCode.DIVERGED


def test_metrics_and_events_of_a_full_disk_are_written_later(disk: Path) -> None:
    """Metrics that a full disk does not take are written once there is space, none lost and none twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(disk)
    assert writer.write(0, 0, loss=8.0) is None
    filler = fill(disk)
    warnings = [writer.write(step, 0, loss=8.0 - step, **{f"long_{i}": 1.0 for i in range(9)}) for step in range(1, 40)]
    assert sum(warning is not None and "No space left" in warning for warning in warnings) > 10
    filler.unlink()
    assert writer.write(40, 0, loss=1.0) is None
    writer.close()
    assert [record["step"] for record in read_metrics(disk / "metrics.jsonl")] == list(range(41))
    events = EventAccumulator(str(disk / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(41))


def test_metrics_that_were_never_written_are_an_error(disk: Path, train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose last metrics do not fit on the disk does not end as if it were complete."""
    backbone = 2**20  # more than the backbone takes, so that there is space for it and not for the metrics
    original = recorder.sealed_bytes

    def serialised(state: Any) -> bytes:
        content = original(state)
        fill(disk, leave_bytes=-(-len(content) // 4096) * 4096)
        return content

    monkeypatch.setattr(MetricsWriter, "write", lambda self, *_, **__: self._lines.write(b"x" * backbone))
    monkeypatch.setattr(recorder, "sealed_bytes", serialised)
    code, error = train()
    assert code == ExitCode.CHECKPOINT
    assert "metrics.jsonl" in error
    assert_failed(disk / "run")
    assert json.loads((disk / "run" / "status.json").read_text())["message"] in error.replace("\\", "")
