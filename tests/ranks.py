"""Runs a function in several processes, each with the environment that torchrun would set.

The processes are forked from a server that has imported torch: the first start takes seconds, later ones a tenth. The
result is what the function returned, `Failed` for an exception, or `Died` for a rank that was killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["fastmoco.trainer", "pipelines.backends.torch", "pipelines.backends.baseline"]


@dataclass(frozen=True)
class Failed:
    """An exception of a rank: class name, message and traceback."""

    kind: str
    message: str
    traceback: str


@dataclass(frozen=True)
class Died:
    """A rank that exited without a result; the code is negative for a signal."""

    code: int | None


def start(
    ranks: int, function: Callable[..., Any], *arguments: Any, threads: int = 1, timeout_s: float = 120.0
) -> list[Any]:
    """Result of `function(*arguments)` on every rank, Failed or Died. Results must be picklable.

    threads    of torch on every rank
    timeout_s  from when all have started
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    processes, receivers = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        environment = {
            "RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": ranks,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,  # hosted here, so that it outlives every rank
        }
        process = context.Process(target=_rank, args=(sender, environment, threads, function, arguments), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        deadline = time.monotonic() + timeout_s
        return [_result(receiver, process, deadline) for receiver, process in zip(receivers, processes, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def results(outcomes: Sequence[Any]) -> list[Any]:
    """The same outcomes; AssertionError if one is a failure."""
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            raise AssertionError(outcome.traceback)
        assert not isinstance(outcome, Died), outcome
    return list(outcomes)


def _rank(
    sender: Connection, environment: dict[str, Any], threads: int, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a fork server that was started for loader workers blocks signals
    torch.set_num_threads(threads)
    try:
        outcome = function(*arguments)
    except BaseException as error:
        outcome = Failed(type(error).__name__, str(error), traceback.format_exc())
    sender.send(outcome)


def _result(receiver: Connection, process: Any, deadline: float) -> Any:
    try:
        if receiver.poll(max(0.0, deadline - time.monotonic())):
            return receiver.recv()
    except EOFError:
        process.join(10)
        return Died(process.exitcode)
    raise AssertionError("a rank neither returned nor failed in time")
