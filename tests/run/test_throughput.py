"""Throughput of the training loop, on a simulated clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastmoco.run.throughput import StepClock


class Time:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def batches(time: Time, *waits_s: float) -> Iterator[int]:
    for number, wait_s in enumerate(waits_s):
        time.s += wait_s
        yield number


def test_rates_since_the_last_reading() -> None:
    time = Time()
    clock = StepClock(32, time)
    for _ in clock.steps(batches(time, 0.5, 0.5)):
        time.s += 1.5
    assert clock.read() == pytest.approx((2 * 32 / 4.0, 25.0))
    for _ in clock.steps(batches(time, 0.0)):
        time.s += 0.5
    assert clock.read() == pytest.approx((64.0, 0.0))


def test_the_overall_rate_excludes_the_first_reading() -> None:
    """It includes compilation and the first batches of the workers."""
    time = Time()
    clock = StepClock(10, time)
    assert clock.images_per_s is None
    reads = []
    for step, _ in enumerate(clock.steps(batches(time, *[0.0] * 6))):
        time.s += 50.0 if step == 0 else 1.0 if step < 4 else 3.0
        if step in (0, 3, 5):
            clock.read()
            reads.append(clock.images_per_s)
    assert reads == pytest.approx([10 / 50, 30 / 3, 50 / 9])


def test_a_pause_is_neither_training_nor_waiting() -> None:
    time = Time()
    clock = StepClock(8, time)
    for _ in clock.steps(batches(time, 1.0, 1.0)):
        time.s += 1.0
        with clock.paused():
            time.s += 1000.0
    assert clock.read() == pytest.approx((16 / 4.0, 50.0))


def test_batches_are_unchanged() -> None:
    time = Time()
    assert list(StepClock(8, time).steps(batches(time, 1, 2, 3))) == [0, 1, 2]


def test_a_wait_while_the_device_has_work_is_not_one_for_data() -> None:
    """The host may be ahead of the device, and a pipeline then makes it wait."""
    time, done = Time(), iter([True, False, True])
    clock = StepClock(8, time, mark=lambda: lambda: next(done))
    for _ in clock.steps(batches(time, 1.0, 5.0)):
        time.s += 1.0
    assert clock.read() == pytest.approx((16 / 8.0, 100 * 1.0 / 8.0))
