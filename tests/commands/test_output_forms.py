"""--quiet and --json on every command, and the command that a stopped run names."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastmoco.cli import main
from fastmoco.console import make_console
from fastmoco.errors import ExitCode
from fastmoco.output import Form, output_form, take_form
from fastmoco.registry import COMMAND_OPTIONS
from fastmoco.trainer import Trainer
from pipelines.data.shapes import make_shapes
from tests.commands.test_cli import TINY

RESULTS = {
    "train": (f"train {' '.join(TINY)} --out RUN-2", "run"),
    "sweep": (f"sweep {' '.join(TINY)} --vary moco-m=0.9 --out SWEEP", "runs"),
    "recipes": ("recipes", "recipes"),
    "scan": ("scan PHOTOS", "images"),
    "views": ("views PHOTOS --crop-size 16 -o views.png", "out"),
    "watch": ("watch RUN", "steps"),
    "eval": ("eval RUN --probes knn --no-pictures --no-feature-cache", "probes"),
    "report": ("report RUN", "runs"),
    "export": ("export RUN --to safetensors -o b.safetensors", "arch"),
    "embed": ("embed PHOTOS --backbone RUN -o e.npz", "feature_dim"),
}
WITHOUT_A_RESULT = {"doctor", "completion"}  # one object, a script


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_the_flags_are_taken_from_anywhere_and_the_last_wins() -> None:
    assert take_form(["train", "--quiet", "a"]) == (Form.QUIET, ["train", "a"])
    assert take_form(["--json", "eval", "run"]) == (Form.JSON, ["eval", "run"])
    assert take_form(["scan", "--json", "--quiet"]) == (Form.QUIET, ["scan"])
    assert take_form(["doctor", "--json"]) == (Form.TEXT, ["doctor", "--json"])


def test_train_with_json_writes_events_and_logs_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", *TINY, "--knn-every", "1", "--log-every", "1", "--json", "--out", str(run)]) == ExitCode.DONE
    captured = capsys.readouterr()
    found = events(captured.out)
    assert [event["event"] for event in found] == ["start", "evaluation", "step", "step", "evaluation", "result"]
    assert found[0]["run"] == str(run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [{name: value for name, value in event.items() if name != "event"} for event in found[1:-1]]
    assert steps == records
    assert Path(found[-1]["backbone"]).is_file()
    assert found[-1]["metrics"]["knn_top1_percent"] == records[-1]["knn_top1_percent"]
    assert "kNN top-1" in captured.err
    assert output_form() == Form.TEXT

    assert main(["eval", str(run), "--probes", "knn", "--no-pictures", "--json", "--no-feature-cache"]) == ExitCode.DONE
    (result,) = events(capsys.readouterr().out)
    assert result["probes"][0]["top1_percent"] >= 0
    out = tmp_path / "b.safetensors"
    assert main(["export", str(run), "--to", "safetensors", "-o", str(out), "--json"]) == ExitCode.DONE
    (result,) = events(capsys.readouterr().out)
    assert (result["out"], result["arch"]) == (str(out), "resnet18")


@pytest.fixture
def in_a_folder_with_run_and_photos(shapes_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes_run, "RUN")
    Path("PHOTOS").mkdir()
    for number, pixels in enumerate(make_shapes(4, start=0)[0]):
        Image.fromarray(pixels).save(f"PHOTOS/{number}.png")


@pytest.mark.parametrize("command", sorted(COMMAND_OPTIONS.keys() - WITHOUT_A_RESULT))
@pytest.mark.usefixtures("in_a_folder_with_run_and_photos")
def test_every_command_ends_with_a_result(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, key = RESULTS[command]
    assert main([*line.split(), "--json"]) == ExitCode.DONE
    result = events(capsys.readouterr().out)[-1]
    assert result["event"] == "result"
    assert result[key]


@pytest.mark.parametrize("command", ["scan", "views", "watch", "eval", "report", "export", "embed"])
@pytest.mark.usefixtures("in_a_folder_with_run_and_photos")
def test_every_command_says_its_result_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RESULTS[command][0].split(), "--quiet"]) == ExitCode.DONE
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert captured.err == ""


def test_train_with_quiet_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--quiet", "--out", str(tmp_path / "run")]) == ExitCode.DONE
    captured = capsys.readouterr()
    warnings = captured.err.splitlines()
    assert [line.partition(" are few to learn ")[2][:4] for line in warnings] == ["from", "in: "]
    assert captured.out.count("\n") == 1
    assert captured.out.startswith("done: ")
    assert "backbone.safetensors" in captured.out


def test_errors_are_events_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["scan", str(tmp_path / "nowhere"), "--json"])
    captured = capsys.readouterr()
    (event,) = events(captured.out)
    assert (event["event"], event["exit_code"]) == ("error", code)
    assert captured.err == f"fastmoco: error: {event['message']}\n"


def test_quiet_shows_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    from fastmoco.console import say
    from fastmoco.output import output_in

    with output_in(Form.QUIET):
        console = make_console()
        say(console, "3 images were left out", "yellow")
        say(console, "epoch 3")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "3 images were left out\n")


def test_a_stopped_run_says_the_command_that_resumes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is taken from the message, and finishes the run."""
    monkeypatch.chdir(tmp_path)
    log = Trainer._log

    def stopped(self: Trainer, lr: float) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return log(self, lr)

    monkeypatch.setattr(Trainer, "_log", stopped)
    run = "runs/with space"
    assert main(["train", *TINY, "--log-every", "1", "--out", run]) == ExitCode.PREEMPTED
    message = capsys.readouterr().err
    assert "stopped by SIGINT at step 1" in message
    match = re.search(r"resume with: fastmoco (.*)\n", message)
    assert match is not None
    assert json.loads(Path(run, "status.json").read_text())["message"].endswith(match[1])
    monkeypatch.setattr(Trainer, "_log", log)
    assert main(shlex.split(match[1])) == ExitCode.DONE
    assert json.loads(Path(run, "status.json").read_text())["state"] == "done"
