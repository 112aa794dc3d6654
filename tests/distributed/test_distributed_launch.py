"""Runs launched by `--gpus` and by torchrun with restarts, and signals and kills sent to their processes."""

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
RUN += ["--cpu-threads", "1"]  # per rank
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT")

Started = subprocess.Popen[bytes]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a Python module in its own process; the output of all its processes goes to the file `output`."""
    started: list[Started] = []

    def call(*arguments: str, **environment: str) -> Started:
        (tmp_path / "output").unlink(missing_ok=True)  # a process of a killed run may still write to the old file
        with (tmp_path / "output").open("wb") as output:
            command = [sys.executable, "-m", *arguments]
            process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
        started.append(process)
        return process

    yield call
    for process in started:
        for child in descendants(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()


def descendants(pid: int) -> list[int]:
    """All running descendants of a process."""
    try:
        children = children_of(pid)
    except OSError:
        return []
    return [*children, *(descendant for child in children for descendant in descendants(child))]


def ranks_of(pid: int) -> dict[int, int]:
    """Process id by rank."""
    processes = {}
    for process in descendants(pid):
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        ranks = [entry for entry in environment if entry.startswith(b"RANK=")]
        if ranks and int(ranks[0][5:]) not in processes:
            processes[int(ranks[0][5:])] = process
    return processes


def wait_for(run: Path, step: int, process: Started, output: Path) -> None:
    """Wait until the run has saved a checkpoint of that step."""
    deadline = time.monotonic() + 180
    while not any(int(path.name[5:14]) >= step for path in (run / "checkpoints").glob("*.safetensors")):
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)


def wait_for_exit(processes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, "a process outlived the run"
        time.sleep(0.1)


def status(run: Path) -> tuple[str, int]:
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["exit_code"]


@pytest.mark.slow
def test_gpus_starts_stops_and_resumes(start: Callable[..., Started], tmp_path: Path) -> None:
    """With workers, which must survive a signal to all processes of a rank until it has saved."""
    run, flags = tmp_path / "run", [*RUN, "--out", str(tmp_path / "run"), "--pipeline", "torch", "--epochs", "500"]
    process = start("fastmoco", "train", "--gpus", "2", *flags)
    wait_for(run, 3, process, tmp_path / "output")
    assert ranks_of(process.pid).keys() == {0, 1}
    children = descendants(process.pid)
    process.terminate()
    assert process.wait(60) == ExitCode.PREEMPTED, (tmp_path / "output").read_text()
    output = (tmp_path / "output").read_text()
    assert "fastmoco: stopped by SIGTERM at step " in output
    assert "Traceback" not in output
    assert status(run) == ("preempted", ExitCode.PREEMPTED)
    wait_for_exit(children)

    process = start("fastmoco", "train", "--resume", "--out", str(run))  # with as many ranks as before
    stopped_at = json.loads((run / "status.json").read_text())["step"]
    wait_for(run, stopped_at + 2, process, tmp_path / "output")
    children = descendants(process.pid)
    os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
    assert process.wait(60) == ExitCode.PREEMPTED, (tmp_path / "output").read_text()
    wait_for_exit(children)


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_rank(start: Callable[..., Started], tmp_path: Path) -> None:
    """It resumes from its last checkpoint with the same command, without --resume."""
    run = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    flags = [*RUN, "--out", str(run), "--pipeline", "resident", "--epochs", "6", "--overwrite"]
    process = start(*torchrun, "-m", "fastmoco", "train", *flags, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for(run, 5, process, tmp_path / "output")
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    assert process.wait(180) == 0, (tmp_path / "output").read_text()
    assert "resumed at step " in (tmp_path / "output").read_text()
    assert status(run) == ("done", 0)


# ---- the interface to torchrun ---------------------------------------------------------------------------------------


def test_rank_info_is_read_from_torchruns_environment(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_exit_code_is_reported_to_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    report_to_torchrun(RankLostError("gone"), 75)  # without torchrun
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    report_to_torchrun(RankLostError("gone"), 75)
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert (message["message"], message["errorCode"]) == ("gone", 75)
    assert int(message["extraInfo"]["timestamp"]) == pytest.approx(time.time(), abs=60)
