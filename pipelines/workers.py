"""What worker processes of every DataLoader share: how they start, and how their failures reach people."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from pipelines.errors import DataError

PREFETCHED = 4  # tasks waiting for each worker


def start_worker(_: int) -> None:
    """Ctrl-C is for the trainer to handle: it ends the workers once its state is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def worker_options(workers: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a DataLoader. Workers are forked from a clean server, not from a process that runs CUDA threads."""
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipelines.torch_crops", "pipelines.dataloader"])  # imports torch once
        options |= {
            "prefetch_factor": PREFETCHED,
            "worker_init_fn": start_worker,
            "multiprocessing_context": context,
        }
    return options


def checked(loader: DataLoader) -> Iterator[Any]:
    """What the loader yields. A DataError that a worker returned as a value is raised; so is a worker's death.

    As a value, because an exception would arrive wrapped in the worker's traceback, its one line lost.
    """
    parts = iter(loader)
    while True:
        try:
            part = next(parts, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            part = DataError(f"{reason}: see whether memory ran out, then start again with --resume")
        if part is None:
            return
        if isinstance(part, DataError):
            del parts  # ends the workers here; from inside a traceback, it would take the loader five seconds
            raise part
        yield part
