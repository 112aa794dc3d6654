"""A loader reports a killed worker at once, whatever locks the worker held."""

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
from pipelines.workers import checked, start_server, worker_options
from tests.ranks import results, start

CPU = torch.device("cpu")
SemLock = type(multiprocessing.get_context("forkserver").Lock()).__mro__[1]


class Numbers(Dataset):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, item: int) -> tuple[int, int]:
        return item, os.getpid()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> tuple[Iterator[Any], Any]:
    """The iterator of `checked` over a loader with two workers, and the loader's own iterator."""
    loader = DataLoader(Numbers(), batch_size=2, **worker_options(2, CPU))  # type: ignore[arg-type]
    iterators: list[Any] = []
    make = DataLoader.__iter__

    def keep(self: DataLoader) -> Any:
        iterators.append(make(self))
        return iterators[0]

    monkeypatch.setattr(DataLoader, "__iter__", keep)
    batches = checked(loader)
    assert len(next(batches)) == 2
    return batches, iterators[0]


def locks_of_workers(value: Any, name: str = "", seen: set[int] | None = None) -> dict[str, Any]:
    """Every inter-process lock that is reachable from a loader and taken by its workers, by its path."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return {}
    seen.add(id(value))
    if isinstance(value, SemLock):
        ours = name.endswith(("_worker_result_queue._rlock", "._wlock")) and "_worker_result_queue._wlock" not in name
        return {} if ours or name.endswith("._sem") else {name: value}
    if isinstance(value, list):
        children = {f"[{i}]": child for i, child in enumerate(value)}
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
def test_a_killed_worker_holds_no_lock(started: tuple[Iterator[Any], Any]) -> None:
    batches, iterator = started
    locks = locks_of_workers(iterator)
    assert {"._worker_result_queue._wlock", "._index_queues[0]._rlock", "._index_queues[1]._rlock"} == set(locks)
    workers = list(iterator._workers)
    for _ in range(20):
        os.kill(workers[0].pid, signal.SIGSTOP)
        if locks["._worker_result_queue._wlock"].acquire(timeout=1):  # the other worker waits for it from now on
            break
        os.kill(workers[0].pid, signal.SIGCONT)  # it was stopped while it held the lock itself
    else:
        raise AssertionError("the lock was never free")
    os.kill(workers[0].pid, signal.SIGKILL)
    del iterator, started
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"pid {workers[0].pid}\) was killed by SIGKILL.*--resume"):
        list(batches)
    assert time.monotonic() - began < 20
    for worker in workers:
        worker.join(5)
        assert worker.exitcode == -signal.SIGKILL


def test_workers_exit_when_the_flag_is_set(started: tuple[Iterator[Any], Any]) -> None:
    batches, iterator = started
    workers = list(iterator._workers)
    assert [worker.is_alive() for worker in workers] == [True, True]
    rest = list(batches)
    assert len(rest) == 499
    del iterator
    for worker in workers:
        worker.join(10)
    assert [worker.exitcode for worker in workers] == [0, 0]


def blocked_signals() -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}


def test_tests_of_several_ranks_receive_signals_whoever_started_the_fork_server() -> None:
    """The server is one per process, and blocks signals if a loader started it."""
    start_server()
    assert results(start(1, blocked_signals)) == [set()]
