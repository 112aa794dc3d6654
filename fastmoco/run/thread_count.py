"""Choice of the number of CPU threads: the fastest under the current load of the machine.

OpenMP threads synchronise at a barrier after every operation, hundreds of times per step. If another process occupies
one of the cores, one of the threads is descheduled for milliseconds at a time, and two threads are several times slower
than one. Sleeping instead of spinning at the barrier does not help, and costs up to half of the throughput on an idle
machine (docs/log.md). So numbers of threads are tried out during training.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from fastmoco.config import RunConfig
from fastmoco.distributed.world import World
from pipelines.platforms import usable_cpus

T = TypeVar("T")
_Steps = Generator[None, float, T]  # receives the seconds of each step

WARM_UP = 2  # steps
WINDOW_STEPS, WINDOW_S = 3, 0.4  # a number of threads is measured over at least so many steps and seconds
LONG_S = 2.0  # or over one step that takes longer
# Step time relative to the best number of threads: below the first, a number replaces it; above the second, the search
# ends in that direction; above the third, it does so after a single step.
BETTER, WORSE, MUCH_WORSE = 0.95, 1.15, 2.0
SLOWER, RECENT_S = 1.3, 1.0  # steps this much slower than when measured, for this long, start a new search
REST_S, MAX_REST_S = 10.0, 60.0  # between two searches; doubled after each that changes nothing
SEARCH_SHARE = 0.02  # of the time may be spent on searches


class ThreadCount:
    """Chooses the number of threads by the durations of steps of equal work.

    max_threads  the initial number: torch's default

    It searches at the start, then every 10 to 60 s, and when steps take 1.3 times as long as before. A search is
    postponed until searches have cost at most 2 % of the time.
    """

    def __init__(self, max_threads: int, set_threads: Callable[[int], object] = torch.set_num_threads) -> None:
        self.max_threads = self.threads = max_threads
        self._set_threads = set_threads
        self._tuning = self._tune()
        next(self._tuning)

    def step(self, seconds: float) -> None:
        """Record how long a step took, and set the number of threads for the next one."""
        self._tuning.send(seconds)

    def steps(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same batches, and count the time from one to the next as a step."""
        began_s = time.perf_counter()
        for batch in batches:
            yield batch
            ended_s = time.perf_counter()
            self.step(ended_s - began_s)
            began_s = ended_s

    def close(self) -> None:
        """Restore the initial number."""
        self._use(self.max_threads)

    def _use(self, threads: int) -> None:
        if threads != self.threads:
            self._set_threads(threads)
            self.threads = threads

    def _tune(self) -> _Steps[None]:
        for _ in range(WARM_UP):
            yield
        rest_s = REST_S
        while True:
            before = self.threads
            step_s, cost_s = yield from self._search()
            rest_s = REST_S if self.threads != before else min(2 * rest_s, MAX_REST_S)
            yield from self._rest(max(rest_s, cost_s / SEARCH_SHARE), step_s)

    def _search(self) -> _Steps[tuple[float, float]]:
        """Switch to the fastest number. Returns its seconds per step, and the seconds lost with slower ones."""
        initial = best = self.threads
        best_s = sum(times := (yield from self._window())) / len(times)
        cost_s = 0.0
        others = candidates(self.max_threads)
        for direction in ([n for n in reversed(others) if n < initial], [n for n in others if n > initial]):
            for threads in direction:
                self._use(threads)
                times = yield from self._window(MUCH_WORSE * best_s)
                step_s = sum(times) / len(times)
                cost_s += max(0.0, sum(times) - len(times) * best_s)
                if step_s > WORSE * best_s:
                    break
                if step_s < BETTER * best_s:
                    best, best_s = threads, step_s
            if best != initial:
                break
        self._use(best)
        return best_s, cost_s

    def _window(self, give_up_s: float = float("inf")) -> _Steps[list[float]]:
        """Seconds of a few steps, ending early after one that takes longer than `give_up_s`."""
        first = yield  # includes building oneDNN's primitives for a new number of threads
        times = [first] if first > LONG_S else []
        while not times or (times[-1] <= min(LONG_S, give_up_s) and not _long_enough(times)):
            times.append((yield))
        return times

    def _rest(self, seconds: float, step_s: float) -> _Steps[None]:
        """Wait until steps have taken `seconds`, or the latest took much longer than `step_s` each."""
        recent, recent_s, elapsed_s = deque[float](), 0.0, 0.0
        while elapsed_s < seconds:
            recent.append((yield))
            recent_s += recent[-1]
            elapsed_s += recent[-1]
            while recent_s - recent[0] > RECENT_S:
                recent_s -= recent.popleft()
            if recent_s > RECENT_S and recent_s > SLOWER * step_s * len(recent):
                return


def tunes_threads(config: RunConfig, world: World) -> bool:
    """Whether a run tunes the number of threads: on a CPU, with one rank, unless the user has set it.

    With several ranks each waits for the others in every step, so step times say little about its own threads.
    """
    return world.device.type == "cpu" and world.size == 1 and config.run.cpu_threads is None


def with_fastest_threads(batches: Iterator[T]) -> Iterator[T]:
    """Yield the same batches, and tune the number of threads for the work between them, up to torch's current one."""
    count = ThreadCount(torch.get_num_threads())
    try:
        yield from count.steps(batches)
    finally:
        count.close()


@contextmanager
def threads_restored(number: int | None = None) -> Iterator[None]:
    """Use this number of threads inside the block, by default `default_threads`; restore the previous one after it."""
    previous = torch.get_num_threads()
    torch.set_num_threads(default_threads() if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def default_threads() -> int:
    """torch's number of threads, or fewer where a container grants fewer cores: torch counts those of the machine.

    OMP_NUM_THREADS, if set, is what torch has, and is not exceeded either.
    """
    return min(torch.get_num_threads(), usable_cpus())


def candidates(max_threads: int) -> list[int]:
    """Numbers of threads to try, ascending: the maximum, one less, three quarters, and halves down to one.

    Down to one, because other programs may use any of the cores.
    """
    halves = {max_threads >> shift for shift in range(max_threads.bit_length())}
    return sorted(halves | {max(1, max_threads - 1), max(1, max_threads * 3 // 4)})


def _long_enough(times: list[float]) -> bool:
    return len(times) >= WINDOW_STEPS and sum(times) >= WINDOW_S
