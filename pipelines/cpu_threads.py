"""Many small torch operations on all cores of a CPU: independent pieces of work side by side, one core each.

torch splits every single operation over the cores and waits for all of them each time. For planes of a few hundred
kilobytes that waiting costs more than half of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(function: Callable[[T], None], pieces: Iterable[T]) -> None:
    """Calls the function with every piece, on as many threads as torch has. Raises what the first failing piece did."""
    pieces, threads = list(pieces), torch.get_num_threads()
    if threads == 1 or len(pieces) == 1:
        for piece in pieces:
            function(piece)
        return
    inference = torch.is_inference_mode_enabled()  # of this thread, and so for its work in others

    def work(piece: T) -> None:
        with torch.inference_mode(inference):
            function(piece)

    for _ in _pool(threads).map(work, pieces):
        pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch does not split operations; every other thread keeps its setting."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
    together = Barrier(threads)  # so that every thread takes one of the tasks below

    def alone(_: int) -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread's first look at the number takes it over for good
        together.wait()

    list(pool.map(alone, range(threads)))
    torch.set_num_threads(threads)  # for threads to come: the number above was also left as their default
    return pool
