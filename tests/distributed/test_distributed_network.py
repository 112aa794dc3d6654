"""Two machines, each a network namespace, whose virtual link is cut during training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_distributed_launch import descendants, ranks_of, wait_for

from fastmoco.cli import main
from tests.ranks import results, start
from tests.run.test_train import BASE, TINY, newest

TIMEOUT_S = 10
RUN = [*TINY, *BASE, "--knn-every", "0", "--pipeline", "resident", "--checkpoint-every", "1", "--epochs", "20"]
RUN += ["--dist-timeout", str(TIMEOUT_S), "--log-every", "1", "--cpu-threads", "1"]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


class Machines:
    """Two network namespaces with addresses 10.77.0.1 and 10.77.0.2."""

    def __init__(self, name: str) -> None:
        self.names = [f"{name}-{number}" for number in (1, 2)]
        self.links = [f"v{os.getpid() % 100000}{side}" for side in "ab"]
        self._started: list[subprocess.Popen[bytes]] = []

    def join(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True), start=1):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")

    def train(self, output: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
        """Start torchrun on both, as in docs/scale-out.md, with one rank each and output in `output`.1 and .2."""
        processes = []
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True), start=1):
            torchrun = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", output.stem]
            torchrun += ["--rdzv-endpoint", "10.77.0.1:29400", "--local-addr", f"10.77.0.{number}"]
            torchrun += ["--rdzv-conf", f"is_host={int(number == 1)}"]  # both have the same host name
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *torchrun]
            environment = os.environ | {
                "GLOO_SOCKET_IFNAME": link,
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                "OMP_NUM_THREADS": "1",
            }
            with output.with_suffix(f".{number}").open("wb") as file:
                process = subprocess.Popen(
                    [*command, "-m", "fastmoco", "train", *arguments], stdout=file, stderr=file, env=environment
                )
            self._started.append(process)
            processes.append(process)
        return processes

    def stop(self) -> None:
        for process in self._started:
            for child in descendants(process.pid):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.wait()

    def remove(self) -> None:
        self.stop()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip of the package iproute2")
    pair = Machines(f"fastmoco-{os.getpid()}")
    try:
        pair.join()
    except (OSError, subprocess.CalledProcessError) as error:
        pair.remove()
        reason = getattr(error, "stderr", b"") or str(error).encode()
        pytest.skip(f"network namespaces are not permitted here: {reason.decode().strip()}")
    yield pair
    pair.remove()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_cut_link_ends_both_in_time_and_the_run_resumes(machines: Machines, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = machines.train(tmp_path / "first", *RUN, "--out", str(run))
    wait_for(run, 5, processes[0], tmp_path / "first.1")
    ranks = [pid for process in processes for pid in ranks_of(process.pid).values()]
    assert len(ranks) == 2

    ip("-n", machines.names[0], "link", "set", machines.links[0], "down")
    cut_s = time.monotonic()
    while any(is_alive(pid) for pid in ranks):
        assert time.monotonic() - cut_s < 3 * TIMEOUT_S, "a rank waits forever"
        time.sleep(0.1)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert "resume with --resume" in status["message"]
    machines.stop()

    ip("-n", machines.names[0], "link", "set", machines.links[0], "up")
    resumed = machines.train(tmp_path / "second", *RUN, "--resume", "--out", str(run))
    assert [process.wait(200) for process in resumed] == [0, 0], (tmp_path / "second.1").read_text()

    assert results(start(2, main, ["train", *RUN, "--out", str(tmp_path / "single")])) == [0, 0]  # on one machine
    state, expected = newest(run), newest(tmp_path / "single")
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []
