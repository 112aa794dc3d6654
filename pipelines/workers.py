"""What worker processes of every DataLoader share: how they start, and how their failures reach people."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import connection, forkserver, sharedctypes
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from pipelines.errors import DataError

PREFETCHED = 4  # tasks waiting for each worker
DEATH_IS_KNOWN_AFTER_S = 5.0  # at most, under load


class _DoneEvent:
    """The flag with which a DataLoader ends its workers, without the lock of `multiprocessing.Event`.

    That lock is taken even to look at the flag, by every worker before every task; one that is killed meanwhile leaves
    it taken, and the trainer then waits for ever to set it. One byte that a single process writes needs none.
    """

    def __init__(self) -> None:
        self._flag = sharedctypes.RawValue("b", 0)

    def set(self) -> None:
        self._flag.value = 1

    def is_set(self) -> bool:
        return bool(self._flag.value)


class _Context(ForkServerContext):
    """Starts workers from a fork server."""

    def Event(self) -> _DoneEvent:  # type: ignore[override]  # noqa: N802  # all of it that a DataLoader uses
        return _DoneEvent()


def start_worker(_: int) -> None:
    """Ctrl-C is for the trainer to handle, like every signal to its process group: it ends the workers once its state
    is saved. SIGTERM is blocked since `start_server`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, name="end-with-trainer", daemon=True).start()
    torch.set_num_threads(1)


def _end_with_trainer() -> None:
    """The loader's own watchdog looks for the process that forked this one: the server, which lives as long as its
    workers do, so that after a SIGKILL of the trainer both would stay for good."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


def worker_options(workers: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a DataLoader. Workers are forked from a clean server, not from a process that runs CUDA threads."""
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:
        start_server()
        options |= {
            "prefetch_factor": PREFETCHED,
            "worker_init_fn": start_worker,
            "multiprocessing_context": _Context(),
        }
    return options


def start_server() -> None:
    """Starts the server that forks the workers, and does not wait; deaf to SIGTERM, as they will be: torchrun sends
    that to whole process groups, and while one rank has no more batches, the others wait for it in vain. SIGKILL still
    ends a worker."""
    forkserver.set_forkserver_preload(["pipelines.backends.torch", "pipelines.backends.baseline"])  # imports torch once
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        forkserver.ensure_running()  # its signal mask is inherited
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def checked(loader: DataLoader) -> Iterator[Any]:
    """What the loader yields. A DataError that a worker returned as a value is raised; so is a worker's death.

    As a value, because an exception would arrive wrapped in the worker's traceback, its one line lost.
    """
    parts = iter(loader)
    workers: Sequence[BaseProcess] = getattr(parts, "_workers", ())
    while True:
        try:
            part = next(parts, None)
        except (RuntimeError, OSError, EOFError) as error:
            # Besides the loader's own word: a tensor's file descriptor is asked for at the worker that made it, and
            # when that has died, by the point it had reached, this is refused, reset or at its end.
            part = _death_among(workers)
            if part is None:
                raise
            for worker in workers:
                worker.kill()  # else the loader waits for one that waits for the dead one's lock
            error.__traceback__ = error.__cause__ = error.__context__ = None  # they hold the loader's iterator
        if part is None:
            return
        if isinstance(part, DataError):
            del parts  # ends the workers here; from inside a traceback, it would take the loader five seconds
            raise part
        yield part


def _death_among(workers: Sequence[BaseProcess]) -> DataError | None:
    """What to tell of the first worker that is dead; its connections are closed before its end is known."""
    if not workers:
        return None
    connection.wait([worker.sentinel for worker in workers], timeout=DEATH_IS_KNOWN_AFTER_S)
    for worker in workers:
        if (code := worker.exitcode) is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            reason = f"DataLoader worker (pid {worker.pid}) {how}"
            return DataError(f"{reason}: see whether memory ran out, then start again with --resume")
    return None
