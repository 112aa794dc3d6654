"""Starts a function in several processes at once, each with the environment that torchrun would give it.

The processes are forked from a server that has imported torch once: the first start costs seconds, the next ones a
tenth. What a function returns or raises comes back; a rank that is killed comes back as `Died`.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["fastmoco.train", "pipelines.backends.torch", "pipelines.backends.baseline"]


@dataclass(frozen=True)
class Failed:
    """An exception of a rank: its class's name, its message and its traceback."""

    kind: str
    message: str
    traceback: str


@dataclass(frozen=True)
class Died:
    """A rank that ended without a word: exit code, negative for a signal."""

    code: int | None


def start(
    ranks: int, function: Callable[..., Any], *arguments: Any, threads: int = 1, timeout_s: float = 120.0
) -> list[Any]:
    """What `function(*arguments)` returned on every rank, or Failed, or Died. Its results must be picklable.

    threads  of torch on every rank. The clock runs from when all have started.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    processes, ends = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        environment = {
            "RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": ranks,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is kept here, so that no rank's end takes it away
        }
        process = context.Process(target=_rank, args=(theirs, environment, threads, function, arguments), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(ours)
    try:
        deadline = time.monotonic() + timeout_s
        return [_result(end, process, deadline) for end, process in zip(ends, processes, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def results(outcomes: Sequence[Any]) -> list[Any]:
    """The outcomes, none of which may be a failure."""
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            raise AssertionError(outcome.traceback)
        assert not isinstance(outcome, Died), outcome
    return list(outcomes)


def _rank(
    end: Connection, environment: dict[str, Any], threads: int, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(threads)
    try:
        outcome = function(*arguments)
    except BaseException as error:
        outcome = Failed(type(error).__name__, str(error), traceback.format_exc())
    end.send(outcome)


def _result(end: Connection, process: Any, deadline: float) -> Any:
    try:
        if end.poll(max(0.0, deadline - time.monotonic())):
            return end.recv()
    except EOFError:
        process.join(10)
        return Died(process.exitcode)
    raise AssertionError("a rank neither returned nor failed in time")
