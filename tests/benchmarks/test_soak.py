"""A run that is killed at random moments loses nothing, and the script sees it if it does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import soak
from benchmarks.soak import Settings, main
from fastmoco.run import checkpoint


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_kills_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = main(Settings(quick=True, out=tmp_path))
    assert result["kills"]["kills"] >= 1
    assert result["lost"] == []
    assert result["kills"]["files_left"] == result["kills"]["shared_memory_left"] == 0
    assert json.loads((tmp_path / "soak.json").read_text())["growth"].keys() == result["growth"].keys()
    assert "lost: nothing" in capsys.readouterr().out


def run(folder: Path, weight: float, loss: float) -> Path:
    """A run with one tensor and one line of metrics."""
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint.save(folder / "checkpoints", 4, {"w": torch.tensor([weight])}, {"step": 4})
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": loss}) + "\n")
    return folder


def test_differences_are_named(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", 1.0, 2.0)
    assert soak._differences(alone, run(tmp_path / "same", 1.0, 2.0)) == []
    assert soak._differences(alone, run(tmp_path / "weight", 1.5, 2.0)) == ["w"]
    assert soak._differences(alone, run(tmp_path / "loss", 1.0, 2.5)) == ["the metrics of step 4"]
    empty = run(tmp_path / "empty", 1.0, 2.0)
    shutil.rmtree(empty / "checkpoints")
    assert soak._differences(alone, empty) == ["the last checkpoint"]
