"""Evaluations on a GPU: however many batches, the host does not wait for the device."""

from __future__ import annotations

import pytest

from tests.standin.run import run_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_no_batch_of_an_evaluation_waits_for_the_device() -> None:
    report = run_program("evaluation")
    assert set(report) == {"extract", "linear", "knn", "center", "padded", "resized"}
    for name, found in report.items():
        assert {batches: counts["waits"] for batches, counts in found.items()} == {"4": [], "16": []}, name
        assert found["16"]["kernels"] > found["4"]["kernels"] > 0, name
