"""Plans made in a background thread, so that a batch need not wait for its plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipelines.views import BatchPlan

AHEAD = 3  # plans that are ready or in progress


def planned_ahead(plans: Iterator[BatchPlan]) -> Iterator[BatchPlan]:
    """The same plans, up to `AHEAD` of them made before they are asked for. Raises what `plans` raises, in its place.

    The thread starts with the first plan and ends when the iterator does, or is closed or freed.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="plans")
    try:
        waiting: deque[Future[BatchPlan | None]] = deque(pool.submit(next, plans, None) for _ in range(AHEAD))
        while (plan := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, plans, None))
            yield plan
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
