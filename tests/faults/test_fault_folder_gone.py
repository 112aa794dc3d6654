"""The folder of a run is deleted or renamed while the run trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmoco.cli import main
from fastmoco.console import shown_path
from fastmoco.errors import ExitCode
from fastmoco.run.directory import read_status
from fastmoco.trainer import Trainer
from tests.run.test_train import RESIDENT, newest

FLAGS = [*RESIDENT, "--cpu-threads", "1", "--epochs", "1", "--knn-every", "0"]


def rename(run: Path) -> None:
    run.rename(run.with_name("renamed"))


def replace(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()
    (run / ".lock").touch()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


LOG, SAVE, END = ["--log-every", "1"], ["--checkpoint-every", "2"], []


@pytest.mark.parametrize(
    ("happens", "flags"),
    [(shutil.rmtree, LOG), (rename, LOG), (replace, LOG), (rename, SAVE), (shutil.rmtree, END)],
    ids=["deleted-log", "renamed-log", "replaced-log", "renamed-save", "deleted-end"],
)
def test_a_folder_that_is_gone_is_noticed_at_the_next_write(
    happens: Callable[[Path], None],
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run whose folder is deleted, renamed or replaced ends at the next write, and does not create it again.

    Its status is recorded in the renamed folder.
    """
    run, steps = tmp_path / "run", Trainer._steps

    def gone(self: Trainer) -> None:
        happens(run)
        steps(self)

    monkeypatch.setattr(Trainer, "_steps", gone)
    before = open_descriptors()
    assert main(["train", *FLAGS, *flags, "--out", str(run)]) == ExitCode.CHECKPOINT
    assert open_descriptors() <= before + 1  # the data set's own
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{run}, the folder of the run, was deleted or renamed while it trained" in error
    if happens is rename:
        assert f"renamed back, and resume with: fastmoco train --resume {shown_path(run)}" in error
        assert not run.exists()
        status = read_status(tmp_path / "renamed")
        assert (status["state"], status["exit_code"]) == ("failed", ExitCode.CHECKPOINT)
    elif happens is replace:
        assert [path.name for path in run.iterdir()] == [".lock"]
    else:
        assert not run.exists()


def test_a_renamed_run_resumes_once_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ended because its folder was renamed resumes from its checkpoint, under either name."""
    run, log = tmp_path / "run", Trainer._log

    def gone(self: Trainer, *arguments: Any) -> Any:
        if self.state.step == 3:
            rename(run)
        return log(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log", gone)
        flags = ["--log-every", "1", "--checkpoint-every", "2"]
        assert main(["train", *FLAGS, *flags, "--out", str(run)]) == ExitCode.CHECKPOINT
    assert main(["train", "--resume", "--out", str(tmp_path / "renamed")]) == ExitCode.DONE
    assert "resumed at step 2 of 4" in capsys.readouterr().out
    assert newest(tmp_path / "renamed")
