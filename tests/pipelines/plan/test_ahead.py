"""Plans from a background thread: the same, in order, a few of them in advance; errors in their place."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.errors import DataError
from pipelines.plan.ahead import AHEAD, planned_ahead
from pipelines.views import BatchPlan


def plan(step: int) -> BatchPlan:
    return BatchPlan(
        step, 0, np.arange(2), np.zeros((2, 2, 4), np.int32), np.zeros((2, 2, 9), np.float32), np.arange(2)
    )


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("plans")]


def ended() -> bool:
    for thread in threads():
        thread.join(30)
    return threads() == []


@pytest.mark.parametrize("count", [0, 1, AHEAD, AHEAD + 4])
def test_the_same_plans_in_order(count: int) -> None:
    assert [p.step for p in planned_ahead(plan(step) for step in range(count))] == list(range(count))
    assert ended()


def test_a_plan_is_made_in_another_thread_and_no_more_than_a_few_in_advance() -> None:
    made: list[int] = []
    makers: set[int] = set()
    enough = threading.Event()

    def plans() -> Iterator[BatchPlan]:
        for step in range(1000):
            makers.add(threading.get_ident())
            made.append(step)
            if step == AHEAD:
                enough.set()
            yield plan(step)

    ahead = planned_ahead(plans())
    assert threads() == []
    assert next(ahead).step == 0
    assert enough.wait(30), "plans are made without being asked for"
    assert next(ahead).step == 1
    assert len(made) <= 2 + AHEAD
    assert threading.get_ident() not in makers
    assert len(makers) == 1
    del ahead
    assert ended()
    assert len(made) <= 2 + AHEAD


def test_an_error_comes_after_the_plans_before_it() -> None:
    def plans() -> Iterator[BatchPlan]:
        yield plan(0)
        raise DataError("no more")

    ahead = planned_ahead(plans())
    assert next(ahead).step == 0
    with pytest.raises(DataError, match="no more"):
        next(ahead)
    assert ended()
