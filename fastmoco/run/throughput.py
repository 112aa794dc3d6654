"""Throughput of training and the share of time spent waiting for data, without evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from fastmoco.nvml import PowerMeter

T = TypeVar("T")


class Rates(NamedTuple):
    images_per_s: float
    data_wait_percent: float


def mark_on(device: torch.device) -> Callable[[], Callable[[], bool]]:
    """`mark` of a StepClock. The work of a CPU is complete when a call returns."""
    if device.type != "cuda":
        return lambda: lambda: True

    def mark() -> Callable[[], bool]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event.query

    return mark


class Usage(NamedTuple):
    """Largest memory allocated so far, and mean power since the last reading; None where that is not measured."""

    memory_bytes: int | None = None
    power_w: float | None = None


def usage_of(device: torch.device) -> Callable[[], Usage]:
    """A function that reads what a run uses of its device, without waiting for it; nothing of a CPU."""
    if device.type != "cuda":
        return Usage
    meter = PowerMeter(str(torch.cuda.get_device_properties(device).uuid))
    return lambda: Usage(torch.cuda.max_memory_allocated(device), meter.read_w())


class StepClock:
    """Rates since the last reading, and over the whole run except its first reading, which includes the warm-up.

    on_step  called with the seconds of each step, from the request of its batch to that of the next
    mark     returns a function that tells whether the device has since completed all work it had been given: only then
             was the wait for a batch one of the device, too
    """

    def __init__(
        self,
        batch_size: int,
        now: Callable[[], float] = time.perf_counter,
        on_step: Callable[[float], None] = lambda _: None,
        mark: Callable[[], Callable[[], bool]] = lambda: lambda: True,
    ) -> None:
        self._batch_size, self._now, self._on_step, self._mark = batch_size, now, on_step, mark
        self._training_since = now()
        self._readings = self._total_steps = 0
        self._total_s = 0.0
        self._restart()

    def _restart(self) -> None:
        self._since, self._waited_s, self._steps = self._now(), 0.0, 0

    def steps(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same batches; count each as a step, and the time to get it as waiting if the device waited."""
        self._training_since = self._now()
        self._restart()  # what came before, such as an evaluation, is neither
        while True:
            training_s, requested = self.training_s, self._now()
            device_is_done = self._mark()
            batch = next(batches, None)
            if device_is_done():
                self._waited_s += self._now() - requested
            if batch is None:
                return
            self._steps += 1
            yield batch
            self._on_step(self.training_s - training_s)

    @property
    def training_s(self) -> float:
        """Seconds since `steps` was called, without pauses."""
        return self._now() - self._training_since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count the block as neither training nor waiting."""
        began = self._now()
        yield
        pause_s = self._now() - began
        self._since += pause_s
        self._training_since += pause_s

    def read(self) -> Rates:
        """Rates since the last reading. Requires a synchronised device and at least one step since then."""
        elapsed = self._now() - self._since
        rates = Rates(self._steps * self._batch_size / elapsed, 100 * self._waited_s / elapsed)
        if self._readings:
            self._total_steps += self._steps
            self._total_s += elapsed
        self._readings += 1
        self._overall = (
            rates.images_per_s if not self._total_s else self._total_steps * self._batch_size / self._total_s
        )
        self._restart()
        return rates

    @property
    def images_per_s(self) -> float | None:
        """Rate over the whole run; None before the first reading."""
        return self._overall if self._readings else None
