"""Signals in every phase of a command: it ends soon, with exit code 75, one line and nothing left behind."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastmoco.cli import main
from fastmoco.errors import ExitCode, Interrupted
from fastmoco.evaluation.online import OnlineEvaluator
from fastmoco.run.preemption import StopFlag
from fastmoco.trainer import Trainer
from tests.oddities import encode, picture
from tests.run.test_train import RESIDENT, TINY, assert_same_run

QUICK = [*RESIDENT, "--no-tensorboard", "--cpu-threads", "1", "--check", "off", "--log-every", "1"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(autouse=True)
def hangups_are_not_ignored() -> Iterator[None]:
    """As they are where `nohup` started the tests."""
    before = signal.getsignal(signal.SIGHUP)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def train(out: Path, *flags: str) -> int:
    return main(["train", *QUICK, "--out", str(out), *flags])


def raising(number: signal.Signals, original: Callable, *, call: int = 1) -> Callable:
    """The function, with a signal at its n-th call."""
    calls = 0

    def wrapped(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(number)
        return original(*arguments, **options)

    return wrapped


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    "phase",
    [
        "fastmoco.run.start.load_dataset",
        "pipelines.data.resident_pixels._read_all",
        "fastmoco.trainer.select",
        "fastmoco.trainer.build_state",
        "fastmoco.trainer.Trainer._evaluate",
    ],
    ids=["index", "decode", "check", "build", "evaluation"],
)
def test_a_signal_before_the_first_step_ends_the_run(
    phase: str,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A signal before the first step ends the run at once, with exit code 75 and one line."""
    module, _, name = phase.rpartition(".")
    owner: object = Trainer if module.endswith("Trainer") else importlib.import_module(module)
    monkeypatch.setattr(owner, name, raising(number, getattr(owner, name)))
    monkeypatch.setattr(Trainer, "_steps", lambda self: pytest.fail("a step was made"))
    assert train(tmp_path / "run", "--check", "on", "--knn-every", "1") == ExitCode.PREEMPTED
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"fastmoco: stopped by {number.name} with nothing to save: start again"
    if (tmp_path / "run" / "status.json").exists():
        assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == ExitCode.PREEMPTED
    assert not [path for path in (tmp_path / "run").rglob("*") if ".tmp" in path.name]


@pytest.mark.parametrize("call", [2, 3], ids=["first epoch", "last epoch"])
def test_an_evaluation_that_a_signal_stops_is_done_on_resume(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal during an evaluation saves the run, and the resumed run evaluates that step: nothing is missing."""
    assert train(tmp_path / "whole", "--knn-every", "1") == ExitCode.DONE
    with monkeypatch.context() as patch:
        patch.setattr(OnlineEvaluator, "_accuracy", raising(signal.SIGTERM, OnlineEvaluator._accuracy, call=call + 1))
        assert train(tmp_path / "run", "--knn-every", "1") == ExitCode.PREEMPTED
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["exit_code"], status["step"]) == (ExitCode.PREEMPTED, 4 * (call - 1))
    assert train(tmp_path / "run", "--knn-every", "1", "--resume") == ExitCode.DONE
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("command", "phase"),
    [
        (["eval", "run", "--device", "cpu"], "fastmoco.commands.eval.read_backbone"),
        (["export", "run", "--to", "torchvision", "--out", "backbone.pth"], "fastmoco.commands.export.read_backbone"),
        (["views", "shapes"], "fastmoco.run.loading.load_dataset"),
        (["scan", "photos"], "fastmoco.commands.scan.find_files"),
    ],
    ids=["eval", "export", "views", "scan"],
)
def test_a_signal_ends_every_command(
    command: list[str],
    phase: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every command ends at a signal, with exit code 75 and one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "photos").mkdir()
    module, _, name = phase.rpartition(".")
    owner = importlib.import_module(module)
    monkeypatch.setattr(owner, name, raising(signal.SIGTERM, getattr(owner, name)))
    assert main(command) == ExitCode.PREEMPTED
    assert capsys.readouterr().err == "fastmoco: stopped by SIGTERM with nothing to save: start again\n"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signals_are_deferred_where_state_is_changed(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    """In a step and in a save a signal sets a flag, and a line says so at once; in an evaluation it interrupts."""
    with StopFlag() as stop, stop.deferred():
        signal.raise_signal(number)
        assert stop.name == number.name
        said = f"fastmoco: {number.name}: stopping when this step is done and saved; another signal ends it at once\n"
        assert capfd.readouterr().err == ("" if number == signal.SIGHUP else said)
        with pytest.raises(Interrupted, match=f"stopped by {number.name}"), stop.interrupting():
            pytest.fail("the signal came before this block")


@pytest.mark.parametrize(
    ("second", "after_s", "launched", "ends"),
    [
        (signal.SIGTERM, 0.5, False, False),  # forwarded by a launcher
        (signal.SIGTERM, 2.5, False, True),
        (signal.SIGTERM, 60.0, True, False),  # torchrun's
        (signal.SIGINT, 0.5, False, True),
        (signal.SIGINT, 60.0, True, True),
    ],
)
def test_a_copy_of_the_first_signal_is_one_with_it(
    second: signal.Signals, after_s: float, launched: bool, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a later or another signal ends the process at once, and it is recorded before."""
    now, codes, messages = [100.0], list[int](), list[str]()
    monkeypatch.setattr("fastmoco.run.preemption.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fastmoco.run.preemption.os._exit", codes.append)
    with StopFlag(launched=launched) as stop, stop.deferred():
        stop.before_exit = lambda message, _: messages.append(message)
        signal.raise_signal(signal.SIGTERM)
        now[0] += after_s
        signal.raise_signal(second)
    assert codes == ([128 + second] if ends else [])
    expected = f"ended by SIGTERM and then {second.name}, before the state was saved"
    assert messages == ([expected] if ends else [])


def test_an_ignored_hangup_stays_ignored() -> None:
    """Under nohup, where SIGHUP is ignored, the end of the terminal does not stop a run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- real processes --------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], object], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_nothing_of(session: int) -> None:
    """No process of the session is left, after a while."""
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-s", str(session)], stdout=subprocess.DEVNULL, check=False).returncode == 0:
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.1)


# Makes every call of a function slow, says on stdout when the first begins, and runs a command.
SLOWED = """
import importlib, sys, time
from fastmoco.cli import main
module, name, *arguments = sys.argv[1:]
owner = importlib.import_module(module)
original = getattr(owner, name)
def slow(*arguments, **options):
    print("begun", flush=True)
    time.sleep(0.05)
    return original(*arguments, **options)
setattr(owner, name, slow)
sys.exit(main(arguments))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("module", "function", "flags"),
    [
        ("pipelines.data.headers", "inspect_header", ["train", *TINY, "--data", "photos", "--out", "run"]),
        ("pipelines.data.index", "decode", ["train", *RESIDENT, "--limit", "4000", "--data", "photos", "--out", "run"]),
        ("pipelines.data.scan", "_scan_file", ["scan", "photos", "--workers", "0", "--out", "scan.npz"]),
    ],
    ids=["index", "decode", "scan"],
)
def test_a_real_signal_while_images_are_read(
    module: str, function: str, flags: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    """A signal while thousands of images are read ends the command in seconds, and leaves no process or file."""
    photos, data = tmp_path / "photos", encode(picture(16, 16), "JPEG", quality=90)
    photos.mkdir()
    for i in range(4000):  # minutes at the speed below
        (photos / f"{i:04}.jpg").write_bytes(data)
    command = [sys.executable, "-c", SLOWED, module, function, *flags]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes) as process:
        assert process.stdout
        while "begun" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == ExitCode.PREEMPTED
    (line,) = errors.splitlines()
    assert line == f"fastmoco: stopped by {number.name} with nothing to save: start again"
    assert_nothing_of(process.pid)
    assert not list(tmp_path.rglob("*.tmp*"))
    assert not (tmp_path / "scan.npz").exists()


@pytest.mark.slow
def test_a_signal_is_obeyed_inside_a_step_of_seconds(tmp_path: Path) -> None:
    """ResNet-50 at 224 pixels on a CPU: a line says at once that the signal has arrived, and that step is the last."""
    out = tmp_path / "run"
    flags = ["--arch", "resnet50", "--crop-size", "224", "--batch-size", "8", "--bn-splits", "1", "--moco-k", "16"]
    flags += ["--limit", "64", "--epochs", "1000", "--knn-every", "0", "--log-every", "1", "--check", "off"]
    flags += ["--device", "cpu", "--cpu-threads", "1", "--pipeline", "resident", "--no-tensorboard", "--out", str(out)]
    command = [sys.executable, "-m", "fastmoco", "train", "shapes", *flags]

    def logged() -> list[int]:
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [step["step"] for step in map(json.loads, lines) if "loss" in step]

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(logged, process)
            done = logged()[-1]
            process.send_signal(signal.SIGTERM)
            assert process.stderr
            assert process.stderr.readline().startswith("fastmoco: SIGTERM: stopping when this step is done")
            assert len(logged()) <= done + 1, "said within the step"
            assert process.wait(timeout=120) == ExitCode.PREEMPTED
        finally:
            process.kill()
    step = json.loads((out / "status.json").read_text())["step"]
    assert done <= step <= done + 2, "the step in which the signal arrived is the last"


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["resident", "torch"])
def test_a_closed_terminal_stops_and_saves_a_run(pipeline: str, tmp_path: Path) -> None:
    """A run whose terminal is closed is saved, ends with exit code 75, and leaves no process."""
    out, flags = tmp_path / "run", ["--epochs", "100000", "--knn-every", "0", "--checkpoint-every", "20"]
    flags += ["--log-every", "1", "--check", "off", "--pipeline", pipeline, "--out", str(out)]
    outside, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmoco", "train", *TINY, *flags],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        preexec_fn=partial(fcntl.ioctl, inside, termios.TIOCSCTTY, 0),
    )
    os.close(inside)
    try:
        wait_until(lambda: drain(outside) or list((out / "checkpoints").glob("step-000000020.safetensors")), process)
        os.close(outside)
        assert process.wait(timeout=60) == ExitCode.PREEMPTED
    finally:
        process.kill()
    status = json.loads((out / "status.json").read_text())
    assert status["message"].startswith("stopped by SIGHUP at step ")
    assert (out / "checkpoints" / f"step-{status['step']:09}.safetensors").exists()
    assert_nothing_of(process.pid)


def drain(descriptor: int) -> None:
    """Read what a terminal shows, so that it does not block."""
    while select.select([descriptor], [], [], 0)[0]:
        os.read(descriptor, 4096)
