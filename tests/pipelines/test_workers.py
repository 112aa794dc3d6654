"""A loader whose worker is killed says so at once, whatever the worker had in its hands."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.errors import DataError
from pipelines.workers import checked, worker_options

CPU = torch.device("cpu")
SemLock = type(multiprocessing.get_context("forkserver").Lock()).__mro__[1]


class Numbers(Dataset):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, item: int) -> tuple[int, int]:
        return item, os.getpid()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> tuple[Iterator[Any], Any]:
    """What `checked` yields, of a loader with two workers, and the loader's own iterator below it."""
    loader = DataLoader(Numbers(), batch_size=2, **worker_options(2, CPU))  # type: ignore[arg-type]
    below: list[Any] = []
    make = DataLoader.__iter__

    def kept(self: DataLoader) -> Any:
        below.append(make(self))
        return below[0]

    monkeypatch.setattr(DataLoader, "__iter__", kept)
    parts = checked(loader)
    assert len(next(parts)) == 2
    return parts, below[0]


def locks_of_workers(value: Any, name: str = "", seen: set[int] | None = None) -> dict[str, Any]:
    """Every lock between processes that is reachable from a loader and that its workers take, by its path."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return {}
    seen.add(id(value))
    if isinstance(value, SemLock):
        ours = name.endswith(("_worker_result_queue._rlock", "._wlock")) and "_worker_result_queue._wlock" not in name
        return {} if ours or name.endswith("._sem") else {name: value}
    if isinstance(value, list):
        children = {f"[{place}]": child for place, child in enumerate(value)}
    elif type(value).__module__.startswith(("multiprocessing", "torch.utils.data", "pipelines")):
        children = {f".{key}": child for key, child in getattr(value, "__dict__", {}).items()}
    else:
        children = {}
    return {
        path: lock
        for key, child in children.items()
        for path, lock in locks_of_workers(child, name + key, seen).items()
    }


@pytest.mark.timeout(60)
def test_a_killed_worker_takes_no_lock_with_it(started: tuple[Iterator[Any], Any]) -> None:
    parts, below = started
    locks = locks_of_workers(below)
    assert {"._worker_result_queue._wlock", "._index_queues[0]._rlock", "._index_queues[1]._rlock"} == set(locks)
    workers = list(below._workers)
    os.kill(workers[0].pid, signal.SIGSTOP)
    assert locks["._worker_result_queue._wlock"].acquire(timeout=5)  # the other worker waits for it from now on
    os.kill(workers[0].pid, signal.SIGKILL)
    del below, started
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"pid {workers[0].pid}\) was killed by SIGKILL.*--resume"):
        list(parts)
    assert time.monotonic() - began < 20
    for worker in workers:
        worker.join(5)
        assert worker.exitcode == -signal.SIGKILL


def test_workers_end_when_the_flag_is_set(started: tuple[Iterator[Any], Any]) -> None:
    parts, below = started
    workers = list(below._workers)
    assert [worker.is_alive() for worker in workers] == [True, True]
    rest = list(parts)
    assert len(rest) == 499
    del below
    for worker in workers:
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [0, 0]
