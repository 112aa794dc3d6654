"""The checks of the step fail where they should: each fault is added to the step of a program."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.standin.checks import check_budget, check_eager_step, check_graph, numbers
from tests.standin.run import run_program
from tests.standin.test_standin_step import report_of

MODE = "cifar"
FAULTS = ("host-wait", "host-copy", "launch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@cache
def reports() -> dict[str, Any]:
    return run_program("step", *(f"--add={fault}" for fault in FAULTS), MODE)


def with_fault(fault: str) -> dict[str, Any]:
    return reports()[f"{MODE}+{fault}"]


def test_a_host_wait_fails_the_eager_step_and_the_capture() -> None:
    report = with_fault("host-wait")
    with pytest.raises(AssertionError, match="cudaStreamSynchronize"):
        check_eager_step(report)
    with pytest.raises(AssertionError, match="cannot be captured"):
        check_graph(report)
    assert report["graph"]["in_default_stream"], "a refused capture leaves its stream as the current one"


def test_a_copy_from_the_host_fails_the_eager_step_and_the_capture() -> None:
    report = with_fault("host-copy")
    with pytest.raises(AssertionError, match="H2D 8 pinned"):
        check_eager_step(report)
    with pytest.raises(AssertionError, match="what the host's memory holds"):
        check_graph(report)


def test_a_launch_fails_the_budget() -> None:
    report = with_fault("launch")
    check_eager_step(report)
    check_graph(report)
    with pytest.raises(AssertionError, match=r"budgets\.json"):
        check_budget(MODE, report)
    before, after = numbers(report_of(MODE)), numbers(report)
    assert {name: after[name] - before[name] for name in after} == {"launches": 1, "device_copies": 0, "graph_nodes": 1}
