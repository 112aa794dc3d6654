"""The time left in a run: available within its first seconds, and correct."""

from __future__ import annotations

import pytest

from fastmoco.run.forecast import MIN_WINDOW_S, WARM_UP_S, WINDOW_S, Forecast


def run(forecast: Forecast, step_s: float, steps: int, first: int = 0, began_s: float = 0.0) -> tuple[int, float]:
    """Mark all steps; returns step and time of the first estimate."""
    first_estimates = [
        (step, began_s + step_s * step)
        for step in range(first + 1, steps + 1)
        if forecast.mark(step, began_s + step_s * (step - first))
    ]
    assert len(first_estimates) == 1
    return first_estimates[0]


@pytest.mark.parametrize("step_s", [0.001, 0.07, 1.5, 4.5])
def test_it_is_available_within_seconds_or_a_few_steps(step_s: float) -> None:
    steps = 20 + round(20 / step_s)
    _, at_s = run(Forecast(steps, steps, 0), step_s, steps)
    assert at_s <= WARM_UP_S + MIN_WINDOW_S + 2 * step_s


def test_one_long_step_is_enough() -> None:
    forecast = Forecast(1000, 100, 0)
    forecast.begin(900)
    assert forecast.mark(901, 60.0)
    assert forecast.left_s == pytest.approx(99 * 60)


def test_slow_first_steps_do_not_count() -> None:
    forecast = Forecast(1000, 1000, 0)
    for step in range(10):
        forecast.mark(step, 0.29 * step)  # thirty times slower than those to come
    for step in range(10, 600):
        forecast.mark(step, 3 + 0.01 * (step - 10))
    assert forecast.left_s == pytest.approx(401 * 0.01, rel=1e-6)


def test_remaining_evaluations_count() -> None:
    """Eleven epochs of 10 steps, evaluated after 2, 4, 6, 8, 10 and 11."""
    forecast = Forecast(110, 10, 2)
    forecast.evaluation_s = 100.0
    left_s = {}
    for step in range(1, 111):
        forecast.mark(step, 5.0 * step)
        left_s[step] = forecast.left_s
    assert left_s[15] == pytest.approx(95 * 5 + 6 * 100)
    assert left_s[19] == pytest.approx(91 * 5 + 6 * 100)
    assert left_s[20] == pytest.approx(90 * 5 + 5 * 100)
    assert left_s[105] == pytest.approx(5 * 5 + 1 * 100)
    assert left_s[110] == 0


def test_a_regular_last_evaluation_counts_once() -> None:
    forecast = Forecast(40, 10, 2)
    forecast.evaluation_s = 100.0
    for step in range(1, 31):
        forecast.mark(step, 5.0 * step)
    assert forecast.left_s == pytest.approx(10 * 5 + 100)


def test_without_evaluations_none_count() -> None:
    forecast = Forecast(40, 10, 0)
    forecast.evaluation_s = 100.0
    for step in range(1, 31):
        forecast.mark(step, 5.0 * step)
    assert forecast.left_s == pytest.approx(50)


def test_only_the_latest_steps_count() -> None:
    """The machine was busy and is now idle."""
    forecast = Forecast(10_000, 10_000, 0)
    for step in range(101):
        forecast.mark(step, 1.0 * step)
    last = 100 + round(WINDOW_S / 0.1)
    for step in range(101, last + 1):
        forecast.mark(step, 100 + 0.1 * (step - 100))
    assert forecast.left_s == pytest.approx((10_000 - last) * 0.1, rel=1e-3)


def test_steps_before_a_resume_do_not_count() -> None:
    forecast = Forecast(1000, 100, 0)
    run(forecast, 0.5, 950, first=900)
    assert forecast.left_s == pytest.approx(50 * 0.5)
