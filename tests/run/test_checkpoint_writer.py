"""Checkpoints in the background: whole files of the right step, and no failure that goes unnoticed."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console
from test_checkpoint import assert_same
from test_checkpoint import tensors_of as any_tensors_of
from torch import Tensor

from fastmoco.cli import main
from fastmoco.config import ResolvedConfig, RunConfig
from fastmoco.errors import CheckpointError, ExitCode
from fastmoco.run import checkpoint
from fastmoco.run.checkpoint_writer import CheckpointWriter
from fastmoco.run.directory import RunDirectory, read_status
from fastmoco.run.recorder import RunRecorder
from fastmoco.run.state import TrainState
from tests.run.test_train import RESIDENT

SAVE = checkpoint.save


def tensors_of(step: int) -> dict[str, Tensor]:
    """One tensor of each kind, all finite: others are not written."""
    return {name: tensor.nan_to_num() for name, tensor in any_tensors_of(step).items()}


class Disk:
    """In place of `checkpoint.save`: waits while it is held, and refuses to write while it is full."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.is_full = False
        self.attempts: list[int] = []

    def save(self, directory: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        assert self.free.wait(60)
        self.attempts.append(step)
        if self.is_full:
            raise CheckpointError("the disk is full")
        return SAVE(directory, step, tensors, meta)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(checkpoint, "save", disk.save)
    return disk


class State:
    """As much of a TrainState as a checkpoint needs; its tensors are live."""

    def __init__(self, step: int) -> None:
        self.step, self.live = step, tensors_of(step)

    def tensors(self) -> dict[str, Tensor]:
        return self.live

    def meta(self) -> dict[str, Any]:
        return {"step": self.step}


class Run:
    """A recorder, what it prints, and its files."""

    def __init__(self, path: Path) -> None:
        config = cast(ResolvedConfig, RunConfig().replace(keep_checkpoints=2, tensorboard=False))
        self.directory = RunDirectory.open(path)
        self.console = Console(file=io.StringIO(), width=200)
        self.recorder = RunRecorder(self.directory, config, self.console)

    def save(self, step: int, *, last_chance: bool = False) -> None:
        self.recorder.save(cast(TrainState, State(step)), step, last_chance=last_chance)

    @property
    def printed(self) -> list[str]:
        return cast(io.StringIO, self.console.file).getvalue().splitlines()

    @property
    def saved(self) -> list[int]:
        return sorted(checkpoint.step_of(path) for path in self.directory.checkpoints.glob("*.safetensors"))

    @property
    def status(self) -> int:
        return read_status(self.directory.path)["step"]


@pytest.fixture
def run(tmp_path: Path, disk: Disk) -> Iterator[Run]:
    run = Run(tmp_path / "run")
    run.recorder.status(0, 0)
    yield run
    disk.free.set()
    run.recorder.close()
    run.directory.close()


# ---- the writer ------------------------------------------------------------------------------------------------------


def test_the_file_has_the_values_of_the_moment_though_training_goes_on(tmp_path: Path, disk: Disk) -> None:
    writer, live, saved = CheckpointWriter(tmp_path, keep=1), tensors_of(1), []
    disk.free.clear()
    writer.start(1, live, {"step": 1}, lambda: saved.append(checkpoint.newest(tmp_path)[0]))
    for tensor in live.values():
        tensor.zero_()
    assert writer.is_writing
    assert not list(tmp_path.iterdir())
    disk.free.set()
    writer.wait()
    path = tmp_path / "step-000000001.safetensors"
    assert saved == [path]
    tensors, meta = checkpoint.load(path, live)
    assert_same(tensors, tensors_of(1))
    assert meta == {"step": 1}
    writer.close()


def test_one_save_at_a_time_and_old_ones_are_deleted(tmp_path: Path, disk: Disk) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (1, 2, 3):
        writer.start(step, tensors_of(step), {}, lambda: None)
        with pytest.raises(AssertionError, match="in use"):  # it would overwrite what is being written
            writer.start(step + 1, tensors_of(step + 1), {}, lambda: None)
        writer.wait()
    writer.close()
    assert sorted(path.name[13] for path in tmp_path.glob("*.safetensors")) == ["2", "3"]
    for path in tmp_path.glob("*.safetensors"):
        assert_same(checkpoint.load(path, tensors_of(0))[0], tensors_of(checkpoint.step_of(path)))


def test_closing_waits_for_the_file(tmp_path: Path, disk: Disk) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    disk.free.clear()
    writer.start(1, tensors_of(1), {}, lambda: None)
    threading.Timer(0.05, disk.free.set).start()
    writer.close()
    assert checkpoint.newest(tmp_path)[0] is not None


# ---- the recorder ----------------------------------------------------------------------------------------------------


def test_the_status_is_that_of_a_complete_checkpoint(run: Run, disk: Disk) -> None:
    disk.free.clear()
    run.save(5)
    assert (run.status, run.saved) == (0, [])
    disk.free.set()
    run.recorder.finish_saving()
    assert (run.status, run.saved) == (5, [5])


def test_a_save_waits_for_the_one_before(run: Run, disk: Disk) -> None:
    disk.free.clear()
    run.save(1)
    threading.Timer(0.05, disk.free.set).start()
    run.save(2)
    assert disk.attempts[0] == 1
    assert 1 in run.saved
    run.recorder.close()
    assert run.saved == [1, 2]


def test_the_last_chance_waits(run: Run, disk: Disk) -> None:
    disk.free.clear()
    threading.Timer(0.05, disk.free.set).start()
    run.save(1, last_chance=True)
    assert (run.status, run.saved) == (1, [1])


def test_failures_are_printed_and_the_third_in_a_row_ends_the_run(run: Run, disk: Disk) -> None:
    run.save(1)
    run.recorder.finish_saving()
    disk.is_full = True
    run.save(2)
    run.save(3)
    assert run.printed == ["the disk is full; training continues and will retry"]
    assert run.status == 2  # how far the run has come
    run.recorder.finish_saving()
    disk.is_full = False
    run.save(4)  # resets the count
    run.recorder.finish_saving()
    disk.is_full = True
    for step in (5, 6, 7):
        run.save(step)
    assert len(run.printed) == 4
    with pytest.raises(CheckpointError, match=r"^the disk is full$"):
        run.save(8)
    assert disk.attempts == [1, 2, 3, 4, 5, 6, 7]
    assert run.saved == [1, 4]


def test_a_failure_on_the_last_chance_is_raised(run: Run, disk: Disk) -> None:
    disk.is_full = True
    with pytest.raises(CheckpointError, match=r"^the disk is full$"):
        run.save(1, last_chance=True)
    assert run.status == 0


def test_the_last_chance_is_taken_after_any_number_of_failures(run: Run, disk: Disk) -> None:
    disk.is_full = True
    for step in (1, 2, 3):
        run.save(step)
    while run.recorder._writer.is_writing:
        time.sleep(0.001)
    disk.is_full = False
    run.save(4, last_chance=True)
    assert run.saved == [4]


def test_a_failed_save_is_repeated_at_the_next_opportunity(run: Run, disk: Disk) -> None:
    assert run.recorder.saved_s_ago() == float("inf")
    disk.free.clear()
    run.save(1)
    assert run.recorder.saved_s_ago() < 600  # it is in progress
    disk.is_full = True
    disk.free.set()
    run.recorder.finish_saving()
    assert run.recorder.saved_s_ago() == float("inf")
    disk.is_full = False
    run.save(2)
    run.recorder.finish_saving()
    assert run.recorder.saved_s_ago() < 600


def test_closing_waits_and_prints_a_failure_without_hiding_why_the_run_ends(run: Run, disk: Disk) -> None:
    disk.free.clear()
    disk.is_full = True
    run.save(1)
    threading.Timer(0.05, disk.free.set).start()
    run.recorder.close()
    assert disk.attempts == [1]
    assert run.printed == ["the disk is full"]


def test_memory_that_is_not_pinned_is_reported_once(run: Run) -> None:
    run.recorder._writer.buffers.not_pinned = "out of memory"
    run.save(1)
    run.save(2)
    assert run.printed == ["checkpoints block the GPU, since memory cannot be pinned (out of memory)"]


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_whose_disk_fills_ends_with_the_error_and_keeps_its_checkpoint(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(directory: Path, step: int, *rest: Any) -> Path:
        disk.is_full = step > 1
        return disk.save(directory, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    flags = ["--checkpoint-every", "1", "--knn-every", "0", "--no-tensorboard", "--out", str(tmp_path / "run")]
    assert main(["train", *RESIDENT, *flags]) == ExitCode.CHECKPOINT
    assert disk.attempts == [0, 1, 2, 3, 4]
    output = capsys.readouterr()
    assert output.out.count("the disk is full; training continues and will retry") == 2
    assert output.err.splitlines()[-1].endswith("the disk is full")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 4, "the disk is full")
    path, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert path is not None
    assert checkpoint.step_of(path) == 1
