"""Runs many small torch operations in parallel: one task per core, instead of each operation split over all cores.

torch splits every operation over the cores and synchronises after each. For planes of a few hundred kilobytes that
synchronisation costs more than half of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")


def parallel_for(function: Callable[[T], None], items: Iterable[T]) -> None:
    """Calls the function with every item, on as many threads as torch has. Raises the first failing item's error."""
    items, threads = list(items), torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        for item in items:
            function(item)
        return
    inference = torch.is_inference_mode_enabled()  # thread-local, so the worker threads must set it too

    def work(item: T) -> None:
        with torch.inference_mode(inference):
            function(item)

    for _ in _pool(threads).map(work, items):
        pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch does not split operations; all other threads keep their setting."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
    barrier = Barrier(threads)  # so that every thread runs exactly one of the tasks below

    def use_one_core(_: int) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread caches the setting when it first reads it
        barrier.wait()

    list(pool.map(use_one_core, range(threads)))
    torch.set_num_threads(threads)  # set_num_threads(1) above also changed the default of threads started later
    return pool
