"""Worker processes of every DataLoader: how they start and stop, and how their failures are reported."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import connection, sharedctypes
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from pipelines import reads
from pipelines.errors import DataError
from pipelines.platforms import clean_context, has_fork_server

PREFETCHED = 4  # tasks queued for each worker
PRELOADED = ["pipelines.backends.torch", "pipelines.backends.baseline"]
EXIT_STUCK = 3  # of a worker that gave up a read
_STUCK_BYTES = 8192  # a path has at most 4096
EXIT_TIMEOUT_S = 5.0  # upper bound, under load, on the time until the exit of a process is visible


class _DoneEvent:
    """The flag with which a DataLoader stops its workers, without the lock of `multiprocessing.Event`.

    Every worker takes that lock before every task just to read the flag. A worker killed while holding it leaves it
    locked, and the trainer then waits forever to set the flag. One byte with a single writer needs no lock.
    """

    def __init__(self) -> None:
        self._flag = sharedctypes.RawValue("b", 0)

    def set(self) -> None:
        self._flag.value = 1

    def is_set(self) -> bool:
        return bool(self._flag.value)


def _context() -> BaseContext:
    """Starts workers, with a lock-free event."""
    context: Any = copy.copy(clean_context(PRELOADED))
    context.Event = _DoneEvent  # set and is_set are all that a DataLoader uses
    return context


class StuckRead:
    """One line of text in memory that a trainer shares with its workers: what a worker waited for when it gave up."""

    def __init__(self) -> None:
        self._text = sharedctypes.RawArray("c", _STUCK_BYTES)

    def end_process(self, line: str) -> None:
        """Leaves the line to the trainer and ends this process, one of whose threads may never return."""
        self._text.value = line.encode("utf-8", "backslashreplace")[: _STUCK_BYTES - 1]
        os._exit(EXIT_STUCK)

    def line(self) -> str:
        """The line, or an empty one."""
        return self._text.value.decode("utf-8", "replace")


def start_worker(_: int, stuck: StuckRead, limit_s: float) -> None:
    """Initialises a worker: one torch thread, an exit when the trainer exits, and one if a read exceeds `limit_s`.

    Ctrl-C, like every signal to the process group, is handled by the trainer, which stops the workers once its state is
    saved. SIGTERM is already blocked by `start_server`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_trainer, name="exit-with-trainer", daemon=True).start()
    reads.watch(limit_s, stuck.end_process)
    torch.set_num_threads(1)


def _exit_with_trainer() -> None:
    """Exits when the trainer does.

    The loader's own watchdog watches the process that forked this one, which is the fork server. The server lives as
    long as its workers, so after a SIGKILL of the trainer both would stay for good.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def worker_options(workers: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a DataLoader. Workers are forked from a clean server, not from a process with CUDA threads."""
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:
        start_server()
        options |= {
            "prefetch_factor": PREFETCHED,
            "worker_init_fn": partial(start_worker, stuck=StuckRead(), limit_s=reads.LIMIT_S),
            "multiprocessing_context": _context(),
        }
    return options


def start_server() -> None:
    """Starts the server that forks the workers, without waiting for it; Windows has none, and no signals.

    The server and its workers block SIGTERM, which torchrun sends to whole process groups, and SIGHUP, which a closed
    terminal does: a rank whose workers died would have no more batches, and the others would wait for it in vain.
    SIGKILL still ends a worker.
    """
    if not has_fork_server():
        return
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(PRELOADED)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        forkserver.ensure_running()  # its signal mask is inherited
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def checked(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Raises a DataError that a worker returned as a value, and one if a worker dies.

    Workers return errors as values because an exception would arrive wrapped in the worker's traceback, and its
    one-line message would be lost.
    """
    batches = iter(loader)
    workers: Sequence[BaseProcess] = getattr(batches, "_workers", ())
    while True:
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            # RuntimeError is the loader's own report. The others come from requesting a tensor's file descriptor from
            # a worker that died: the connection is refused, reset or at its end, depending on when it died.
            batch = _dead_worker_error(workers, loader.worker_init_fn)
            if batch is None:
                raise
            for worker in workers:
                worker.kill()  # else the loader waits for one that waits for a lock the dead worker holds
            error.__traceback__ = error.__cause__ = error.__context__ = None  # they hold the loader's iterator
        if batch is None:
            return
        if isinstance(batch, DataError):
            del batches  # stops the workers now; kept alive by a traceback, the loader would take five seconds
            raise batch
        yield batch


def _dead_worker_error(workers: Sequence[BaseProcess], init: Any) -> DataError | None:
    """The error for the first dead worker, if any. Its connections close before its exit code is known: so wait.

    init  what `worker_options` made to initialise the workers
    """
    if not workers:
        return None
    connection.wait([worker.sentinel for worker in workers], timeout=EXIT_TIMEOUT_S)
    if line := init.keywords["stuck"].line():
        return DataError(line)
    for worker in workers:
        if (code := worker.exitcode) is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            reason = f"DataLoader worker (pid {worker.pid}) {how}"
            return DataError(f"{reason}: check whether memory ran out, then restart with --resume")
    return None
