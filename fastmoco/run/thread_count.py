"""How many threads a CPU trains with: as many as are fastest beside whatever else runs on the machine.

OpenMP's threads meet at a barrier after every operation, hundreds of times a step, and wait there for the slowest.
Where another process has one of the cores, one of the threads is off it for milliseconds at a time, and two threads are
several times slower than one. Threads that sleep at the barrier instead of spinning do not cure that, and cost up to
half of the rate on an idle machine (docs/log.md). So the number of threads is tried out while the steps go on.
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

T = TypeVar("T")
_Steps = Generator[None, float, T]  # is sent the seconds of one step after the other

WARM_UP = 2  # steps
WINDOW_STEPS, WINDOW_S = 3, 0.4  # what a number of threads is judged by: so many steps that take so long
LONG_S = 2.0  # steps that take longer are judged one by one
BETTER, WORSE, MUCH_WORSE = 0.95, 1.15, 2.0  # of the time of a step: to be changed to, to be left, after one step
SLOWER, RECENT_S = 1.3, 1.0  # of the time of a step when its threads were chosen, for so long: something has changed
REST_S, LONGEST_REST_S = 10.0, 60.0  # between two searches, twice as long after each that changes nothing
SHARE = 0.02  # of the time, for searches


class ThreadCount:
    """Chooses the number of threads by the times of steps of equal work.

    most  of threads, and what it starts with: what torch would use

    Others are tried at the start, then every 10 to 60 s, and when steps take 1.3 times as long as they did. A search is
    put off until all of them have cost at most 2 % of the time.
    """

    def __init__(self, most: int, set_threads: Callable[[int], object] = torch.set_num_threads) -> None:
        self.most = self.threads = most
        self._set_threads = set_threads
        self._plan = self._forever()
        next(self._plan)

    def step(self, seconds: float) -> None:
        """To be told how long a step took; sets the number of threads of the next one."""
        self._plan.send(seconds)

    def steps(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches: what happens from one to the next is a step."""
        began = time.perf_counter()
        for batch in batches:
            yield batch
            ended = time.perf_counter()
            self.step(ended - began)
            began = ended

    def close(self) -> None:
        """Sets the number it started with."""
        self._use(self.most)

    def _use(self, threads: int) -> None:
        if threads != self.threads:
            self._set_threads(threads)
            self.threads = threads

    def _forever(self) -> _Steps[None]:
        for _ in range(WARM_UP):
            yield
        rest_s = REST_S
        while True:
            before = self.threads
            step_s, cost_s = yield from self._search()
            rest_s = REST_S if self.threads != before else min(2 * rest_s, LONGEST_REST_S)
            yield from self._rest(max(rest_s, cost_s / SHARE), step_s)

    def _search(self) -> _Steps[tuple[float, float]]:
        """Leaves the fastest number in use. Returns its seconds a step, and the seconds that slower ones have cost."""
        began = best = self.threads
        best_s = sum(times := (yield from self._window())) / len(times)
        cost_s = 0.0
        others = candidates(self.most)
        for direction in ([n for n in reversed(others) if n < began], [n for n in others if n > began]):
            for threads in direction:
                self._use(threads)
                times = yield from self._window(MUCH_WORSE * best_s)
                step_s = sum(times) / len(times)
                cost_s += max(0.0, sum(times) - len(times) * best_s)
                if step_s > WORSE * best_s:
                    break
                if step_s < BETTER * best_s:
                    best, best_s = threads, step_s
            if best != began:
                break
        self._use(best)
        return best_s, cost_s

    def _window(self, give_up_s: float = float("inf")) -> _Steps[list[float]]:
        """Seconds of a few steps, or of the first that takes longer than `give_up_s`."""
        first = yield  # builds oneDNN's primitives for a new number of threads
        times = [first] if first > LONG_S else []
        while not times or (times[-1] <= min(LONG_S, give_up_s) and not _long_enough(times)):
            times.append((yield))
        return times

    def _rest(self, seconds: float, step_s: float) -> _Steps[None]:
        """Until so many seconds of steps have passed, or the last few took much longer than `step_s` each."""
        recent, recent_s, passed_s = deque[float](), 0.0, 0.0
        while passed_s < seconds:
            recent.append((yield))
            recent_s += recent[-1]
            passed_s += recent[-1]
            while recent_s - recent[0] > RECENT_S:
                recent_s -= recent.popleft()
            if recent_s > RECENT_S and recent_s > SLOWER * step_s * len(recent):
                return


def tunes_threads(config: RunConfig, world: World) -> bool:
    """Whether a run is to choose the number: alone on a CPU, where the user has given none.

    Of several ranks each waits for the others in every step, whose time then tells nothing about its own threads.
    """
    return world.device.type == "cpu" and world.size == 1 and config.run.cpu_threads is None


def with_fastest_threads(batches: Iterator[T]) -> Iterator[T]:
    """The same batches; what is done with each uses as many threads as are fastest, at most those that torch has."""
    count = ThreadCount(torch.get_num_threads())
    try:
        yield from count.steps(batches)
    finally:
        count.close()


@contextmanager
def threads_restored(number: int | None = None) -> Iterator[None]:
    """Uses this number of threads from here on, if one is given, and after the block the one from before."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def candidates(most: int) -> list[int]:
    """The numbers of threads that are tried, rising: most, one less, three quarters, and halves down to one.

    Down to one, because a container may have a share of a machine whose cores torch counts.
    """
    halves = {most >> shift for shift in range(most.bit_length())}
    return sorted(halves | {max(1, most - 1), max(1, most * 3 // 4)})


def _long_enough(times: list[float]) -> bool:
    return len(times) >= WINDOW_STEPS and sum(times) >= WINDOW_S
