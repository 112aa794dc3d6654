"""Checks with faults, each to be run in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from fastmoco.doctor.findings import Finding, Target
from pipelines.errors import BackendMissingError


def fine(target: Target) -> Finding:
    print("noise on standard output")
    return Finding(text="all is well", figures={"pid": os.getpid(), "rate": 2.5})


def raises(target: Target) -> Finding:
    raise ValueError("the value is\nwrong")


def missing(target: Target) -> Finding:
    raise BackendMissingError("not installed: pip install it")


def crashes(target: Target) -> Finding:
    os.write(2, b"about to crash\n")
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)
    raise AssertionError


def exits(target: Target) -> Finding:
    os._exit(3)


def hangs(target: Target) -> Finding:
    """With a child, whose pid it leaves in a file."""
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    Path(target.scratch, "child").write_text(str(child))
    time.sleep(600)
    raise AssertionError


def gloo_with_a_fault(target: Target) -> Finding:
    """A rank that is killed before it has joined."""

    from fastmoco.distributed import probe
    from fastmoco.doctor import ranks

    def die(sender: Any, backend: str, store: str, rank: int, *rest: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        sender.send(0.1)

    probe._rank = die
    return ranks.gloo(target)
