"""A checkpoint on a GPU: a few large copies into pinned memory, for which the thread that trains does not wait."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.standin.run import run_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FLAGS = ["--device", "cuda", "--limit", "64", "--batch-size", "8", "--moco-k", "64", "--arch", "resnet18"]
FLAGS += ["--width", "0.125", "--no-tensorboard"]


def test_a_checkpoint_takes_nine_copies_and_no_wait_of_the_training_thread(tmp_path: Path) -> None:
    found = run_program("checkpoint", str(tmp_path / "run"), *FLAGS)
    assert found["tensors"] == 312
    assert len(found["copies"]) == 9
    assert [copy for copy in found["copies"] if " D2H " not in copy or "pinned" not in copy] == []
    assert [wait for wait in found["waits"] if "(main)" in wait] == []
    assert [wait.split()[0] for wait in found["waits"]] == ["cudaEventSynchronize"]  # of the thread that writes
    assert found["allocations"] == []  # the memory of the first checkpoint is used again
    assert found["kernels"] == 0
