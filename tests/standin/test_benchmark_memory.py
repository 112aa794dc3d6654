"""What the benchmarks report of a graph's memory is what the same step needs without a graph."""

from __future__ import annotations

import pytest

from tests.standin.run import run_program

ROUNDING = 2**20  # bytes: the allocator leaves the rest of a large block unused up to this size


@pytest.mark.slow
def test_the_peak_of_a_graph_is_that_of_its_step_and_its_inputs() -> None:
    found = run_program("benchmark_memory")
    eager, graph = found["triton"], found["graph"]
    expected = eager["peak_allocated_bytes"] + found["inputs_bytes"]
    assert graph["peak_allocated_bytes"] == pytest.approx(expected, abs=ROUNDING)
    assert graph["peak_allocated_bytes"] > 5 * graph["allocated_bytes"]  # a replay itself allocates nothing
    assert graph["reserved_bytes"] >= graph["peak_allocated_bytes"]
