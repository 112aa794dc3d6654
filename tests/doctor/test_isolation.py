"""An exception, a crash and a hang of a check are findings, and end nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from fastmoco.doctor.findings import Check, Status, Target
from fastmoco.doctor.isolation import run_check


def check(name: str, limit_s: float = 60.0) -> Check:
    return Check("machine", name, f"tests.doctor.faults:{name}", limit_s)


def test_a_check_runs_in_another_process(target: Target, capfd: pytest.CaptureFixture[str]) -> None:
    result = run_check(check("fine"), target)
    assert result.finding.status == Status.OK
    assert result.finding.figures["pid"] != os.getpid()
    assert "noise" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("raises", Status.FAILED, "ValueError: the value is wrong"),
        ("missing", Status.MISSING, "not installed: pip install it"),
        ("crashes", Status.FAILED, "its process was killed by SIGSEGV (Segmentation fault)"),
        ("exits", Status.FAILED, "its process exited with code 3"),
        (
            "not_there",
            Status.FAILED,
            "AttributeError: module 'tests.doctor.faults' has no attribute 'not_there'",
        ),
    ],
)
def test_a_fault_is_a_finding_of_one_line(target: Target, name: str, status: Status, text: str) -> None:
    finding = run_check(check(name), target).finding
    assert (finding.status, finding.text) == (status, text)


def test_a_check_that_hangs_is_killed_with_what_it_started(target: Target) -> None:
    pid = Path(target.scratch, "child")
    finding, limit_s = None, 2.0
    while not pid.exists():  # on a busy machine it may not get that far
        finding = run_check(check("hangs", limit_s), target).finding
        limit_s *= 2
    assert finding is not None
    assert finding.status == Status.FAILED
    assert finding.text.startswith("no result after ")
    assert finding.advice
    deadline = time.monotonic() + 20
    while _is_running(int(pid.read_text())):
        assert time.monotonic() < deadline, "its child still runs"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_a_server_for_processes_it_is_a_finding(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess._Popen", refuse)
    finding = run_check(check("fine"), target).finding
    assert finding.status == Status.FAILED
    assert finding.text == "no process could be started (EOFError: unexpected EOF)"


def test_two_processes_sum(target: Target) -> None:
    assert run_check(Check("distributed", "gloo", "fastmoco.doctor.ranks:gloo"), target).finding.status == Status.OK
    finding = run_check(check("gloo_with_a_fault"), target).finding
    assert (finding.status, finding.text) == (Status.FAILED, "rank 1 exited without a result")
