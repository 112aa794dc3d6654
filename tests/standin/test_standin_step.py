"""The training step of every mode on the stand-in: no waits, no host copies, a legal capture, and counted launches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.standin.checks import COMPILED, FAST, GROUPS, OTHERS, check_budget, check_eager_step, check_graph
from tests.standin.run import run_program

SLOW = (pytest.mark.slow, pytest.mark.timeout(900))
MODES = [*FAST, *(pytest.param(mode, marks=SLOW) for mode in OTHERS + COMPILED)]


@cache
def group(modes: tuple[str, ...]) -> dict[str, Any]:
    return run_program("step", *modes)


def report_of(mode: str) -> dict[str, Any]:
    return next(group(modes)[mode] for modes in GROUPS if mode in modes)


@pytest.mark.parametrize("mode", MODES)
def test_an_eager_step_neither_waits_nor_copies(mode: str) -> None:
    check_eager_step(report_of(mode))


@pytest.mark.parametrize("mode", MODES)
def test_the_capture_is_legal_and_a_replay_is_one_launch(mode: str) -> None:
    check_graph(report_of(mode))


@pytest.mark.parametrize("mode", MODES)
def test_launches_and_graph_nodes_are_those_of_the_budget(mode: str) -> None:
    check_budget(mode, report_of(mode))
