"""Processes as people start them: `--gpus`, torchrun with restarts, and the signals and kills that reach them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastmoco.distributed.launch import SINGLE_PROCESS, RankInfo, is_launched, report_to_torchrun
from fastmoco.errors import ConfigError, ExitCode, RankLostError
from tests.run.test_train import BASE, TINY, children_of

RUN = [*TINY, *BASE, "--knn-every", "0", "--checkpoint-every", "1", "--dist-timeout", "60"]
RUN += ["--cpu-threads", "1"]  # of each rank
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")

Started = subprocess.Popen[bytes]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a Python module in a process of its own; what all its processes say goes to the file `said`."""
    started: list[Started] = []

    def call(*arguments: str, **environment: str) -> Started:
        (tmp_path / "said").unlink(missing_ok=True)  # what is left of a killed one may still write to its own
        with (tmp_path / "said").open("wb") as said:
            command = [sys.executable, "-m", *arguments]
            process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | environment)
        started.append(process)
        return process

    yield call
    for process in started:
        for child in descendants(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()


def descendants(pid: int) -> list[int]:
    """Of a process, all that have not ended."""
    try:
        children = children_of(pid)
    except OSError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


def ranks_of(pid: int) -> dict[int, int]:
    """Rank → process."""
    found = {}
    for process in descendants(pid):
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
        if ranks and int(ranks[0][5:]) not in found:
            found[int(ranks[0][5:])] = process
    return found


def wait_for(run: Path, step: int, process: Started, said: Path) -> None:
    """Until the run has checkpointed that step."""
    deadline = time.monotonic() + 180
    while not any(int(path.name[5:14]) >= step for path in (run / "checkpoints").glob("*.safetensors")):
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)


def wait_for_the_end_of(processes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, "a process outlived the run"
        time.sleep(0.1)


def status(run: Path) -> tuple[str, int]:
    found = json.loads((run / "status.json").read_text())
    return found["state"], found["exit_code"]


@pytest.mark.slow
def test_gpus_starts_stops_and_goes_on(start: Callable[..., Started], tmp_path: Path) -> None:
    """With worker processes, which the signal to all of a rank's processes must not take away before it has saved."""
    run, flags = tmp_path / "run", [*RUN, "--out", str(tmp_path / "run"), "--pipeline", "torch", "--epochs", "500"]
    process = start("fastmoco", "train", "--gpus", "2", *flags)
    wait_for(run, 3, process, tmp_path / "said")
    assert ranks_of(process.pid).keys() == {0, 1}
    helpers = descendants(process.pid)
    process.terminate()
    assert process.wait(60) == ExitCode.PREEMPTED, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert "fastmoco: stopped: stopped by SIGTERM at step " in said
    assert "Traceback" not in said
    assert status(run) == ("preempted", ExitCode.PREEMPTED)
    wait_for_the_end_of(helpers)

    process = start("fastmoco", "train", "--resume", "--out", str(run))  # with as many as before
    stopped_at = json.loads((run / "status.json").read_text())["step"]
    wait_for(run, stopped_at + 2, process, tmp_path / "said")
    helpers = descendants(process.pid)
    os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
    assert process.wait(60) == ExitCode.PREEMPTED, (tmp_path / "said").read_text()
    wait_for_the_end_of(helpers)


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(start: Callable[..., Started], tmp_path: Path) -> None:
    """It goes on from its last checkpoint with the same command, which does not say --resume."""
    run = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    flags = [*RUN, "--out", str(run), "--pipeline", "resident", "--epochs", "6", "--overwrite"]
    process = start(*torchrun, "-m", "fastmoco", "train", *flags, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for(run, 5, process, tmp_path / "said")
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    assert process.wait(180) == 0, (tmp_path / "said").read_text()
    assert "resumed at step " in (tmp_path / "said").read_text()
    assert status(run) == ("done", 0)


# ---- what torchrun tells a rank, and is told -------------------------------------------------------------------------


def test_a_place_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert RankInfo.from_environment() == SINGLE_PROCESS
    assert not is_launched()
    for name, value in zip(NAMES, ["5", "8", "1", "4", "1", "2"], strict=True):
        monkeypatch.setenv(name, value)
    assert RankInfo.from_environment() == RankInfo(5, 8, local_rank=1, local_size=4, machine=1, restarts=2)
    assert is_launched()
    monkeypatch.setenv("RANK", "-1")
    with pytest.raises(ConfigError, match="RANK is '-1', expected a number as torchrun sets it"):
        RankInfo.from_environment()


def test_torchrun_is_told_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    report_to_torchrun(RankLostError("gone"), 75)  # nobody asks
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    report_to_torchrun(RankLostError("gone"), 75)
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert (message["message"], message["errorCode"]) == ("gone", 75)
    assert int(message["extraInfo"]["timestamp"]) == pytest.approx(time.time(), abs=60)
