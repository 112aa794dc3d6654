"""`fastmoco watch`: follows the files of a run that is not its own, whatever state they are in."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastmoco.cli import main
from fastmoco.commands.watch import watch_command
from fastmoco.commands.watch_options import WatchOptions
from fastmoco.errors import AlreadyReportedError, ExitCode, Interrupted
from fastmoco.run.directory import RunDirectory
from fastmoco.run.follow import FollowedRun
from fastmoco.run.sparkline import sparkline
from tests.commands.test_cli import TINY

CONFIG = json.dumps({"optim": {"epochs": 4, "batch_size": 32}})


class Run:
    """The folder of a run, written by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self) -> None:
        self.folder.mkdir()
        (self.folder / "config.json").write_text(CONFIG)
        self.status("running", 0)

    def status(self, state: str, step: int, exit_code: int | None = None, **values: Any) -> None:
        plan = {"steps": 40, "steps_per_epoch": 10, "chance_loss": 4.25}
        record = {"state": state, "exit_code": exit_code, "step": step, "versions": {}, **plan, **values}
        (self.folder / "status.json").write_text(json.dumps(record))

    def metrics(self, text: str) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(text)

    def log(self, step: int, **values: Any) -> None:
        self.metrics(json.dumps({"step": step, "epoch": step // 10} | values) + "\n")


def follow(run: Path, moments: Sequence[Callable[[], object]], console: Console) -> int:
    """Watch, with one moment after the other instead of each sleep; returns the exit code."""
    left = iter(moments)

    def sleep(seconds: float) -> None:
        moment = next(left, None)
        assert moment is not None, "the watch should have ended"
        moment()

    try:
        watch_command(WatchOptions(run=str(run)), sleep, console)
    except AlreadyReportedError as error:
        return error.code
    finally:
        assert next(left, None) is None, "the watch should not have ended"
    return ExitCode.DONE


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_run_is_followed_from_before_its_beginning_to_its_end(run: Run) -> None:
    output = io.StringIO()
    moments = [
        lambda: None,
        run.begin,
        lambda: run.log(5, loss=4.2, images_per_s=64.0, data_wait_percent=41.0),
        lambda: run.log(10, knn_top1_percent=33.3, verdict="learning", remedy="none needed"),
        lambda: run.metrics('{"step": 15, "epoch": 1, "lo'),
        lambda: run.metrics('ss": 3.5}\n'),
        lambda: run.status("done", 40, 0),
    ]
    assert follow(run.folder, moments, Console(file=output, width=80)) == ExitCode.DONE
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("waiting for ")
    assert lines[1:5] == [
        "running  epoch 0.00/4  step 0/40",
        "running  epoch 0.50/4  step 5/40  loss 4.2000 (chance 4.25)  64 images/s  data wait 41 %  about 18 s left",
        "running  epoch 1.00/4  step 10/40  loss 4.2000 (chance 4.25)  kNN 33.3 %  64 images/s  data wait 41 %  "
        "about 15 s left  learning",
        "running  epoch 1.50/4  step 15/40  loss 3.5000 (chance 4.25)  kNN 33.3 %  64 images/s  data wait 41 %  "
        "about 12 s left  learning",
    ]
    assert "done  epoch 4.00/4  step 40/40" in lines[-1]
    assert len(lines) == 7


def test_the_block_on_a_terminal_fits_into_80_columns(run: Run) -> None:
    run.begin()
    for step in range(1, 31):
        run.log(step, loss=4.25 - step / 20, images_per_s=1234.5, data_wait_percent=3.0, device_memory_bytes=2**34)
    run.log(30, knn_top1_percent=40.0, verdict="input-bound: 41 % waiting", remedy="more --workers, or --pipeline ffcv")
    output = io.StringIO()
    console = Console(file=output, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    assert follow(run.folder, [lambda: run.status("done", 40, 0)], console) == ExitCode.DONE
    text = output.getvalue()
    for expected in (
        "epoch 3.00/4  step 30/40  about 0 s left",
        "█▇",
        "2.7500 (chance 4.25)",
        "40.0 %",
        "input-bound: 41 % waiting",
        "more --workers",
    ):
        assert expected in text
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(("state", "code"), [("failed", 5), ("preempted", 75), ("failed", 137)])
def test_it_ends_with_the_exit_code_of_the_run(run: Run, state: str, code: int) -> None:
    run.begin()
    output = io.StringIO()
    moments = [lambda: run.status(state, 7, code, message="resume with: fastmoco train --resume runs/a")]
    assert follow(run.folder, moments, Console(file=output, width=80)) == code
    assert "resume with: fastmoco train --resume runs/a" in output.getvalue()


def test_ctrl_c_leaves_the_watch_without_an_error(run: Run) -> None:
    run.begin()

    def interrupted() -> None:
        raise Interrupted("stopped by SIGINT")

    assert follow(run.folder, [interrupted], Console(file=io.StringIO())) == ExitCode.DONE


def test_damaged_and_foreign_files_are_passed_over(run: Run) -> None:
    followed = FollowedRun(run.folder)
    assert not followed.update()
    run.begin()
    run.metrics('\0\0\0\n[1]\n{"step": "x"}\n{"step": true}\nnull\n{"step": 3, "epoch": 0, "loss": null}\n')
    run.log(4, loss=1.5)
    assert followed.update()
    assert (followed.step, followed.series["loss"]) == (4, [1.5])
    (run.folder / "status.json").write_text('{"state": "run')
    followed.update()
    assert followed.state == "running"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "status.json", "metrics.jsonl"])
def test_a_pipe_with_the_name_of_a_file_is_not_waited_for(run: Run, name: str) -> None:
    run.begin()
    run.log(4, loss=1.5)
    (run.folder / name).unlink()
    os.mkfifo(run.folder / name)
    followed = FollowedRun(run.folder)
    assert followed.update()
    assert followed.exists == (name != "status.json")
    assert followed.series["loss"] == ([] if name == "metrics.jsonl" else [1.5])


def test_a_resumed_run_is_read_again(run: Run) -> None:
    """Its metrics after the checkpoint are removed, and written anew."""
    run.begin()
    followed = FollowedRun(run.folder)
    for step in (5, 10, 15):
        run.log(step, loss=float(step))
    followed.update()
    path = run.folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    run.log(10, loss=7.0)
    followed.update()
    assert followed.series["loss"] == [5.0, 7.0]
    assert followed.latest["step"] == 10


def test_a_real_run_and_the_folder_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    assert main(["train", *TINY, "--out", str(runs / "a"), "--quiet"]) == ExitCode.DONE
    capsys.readouterr()
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert main(["watch", str(runs / "a"), "--once"]) == ExitCode.DONE
    line = capsys.readouterr().out
    assert line.startswith("done  epoch 1.00/1  step 2/2  loss ")
    assert "(chance 2.83)" in line
    assert main(["watch", str(runs), "--once", "--json"]) == ExitCode.DONE
    (result,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(one["state"], one["step"], one["steps"]) for one in result["runs"]] == [("done", 2, 2)]
    assert main(["watch", str(runs / "a")]) == ExitCode.DONE
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_watching_does_not_keep_a_run_from_being_opened(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run")
    run.write_status(step=0, epoch=0)
    followed = FollowedRun(run.path)
    assert followed.update()
    assert followed.state == "running"
    run.close()
    again = RunDirectory.open(run.path, resume=False, overwrite=True)  # ConfigError if another process uses it
    assert not (again.path / "status.json").exists()
    again.close()
    assert not followed.update(), "the file is gone, and nothing is new"


def test_sparkline_shows_the_shape_of_a_series() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(range(800), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 1, 1], 8) == "▁▁▁"
    assert sparkline([0.0, 7.0], 8, ascii_only=True) == "_@"
    assert sparkline([], 8) == ""
