"""Runs whose numbers leave the finite ones, loudly or silently."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmoco.cli import main
from fastmoco.config import RunOptions
from fastmoco.errors import DivergedError, ExitCode
from fastmoco.run import checkpoint
from fastmoco.run.checkpoint_writer import SKIPPED, CheckpointWriter
from fastmoco.run.divergence import PINNED_LOGS, LossWatch, not_finite
from tests.run.test_train import RESIDENT
from tests.step.test_step_parity import EMA, LR, changed, make_step, random_views, whole_state

QUICK = [*RESIDENT, "--knn-every", "0", "--no-tensorboard", "--cpu-threads", "1", "--check", "off"]


def train(out: Path, *flags: str) -> int:
    return main(["train", *QUICK, "--out", str(out), *flags])


@pytest.mark.parametrize(
    "flags",
    [["--amp", "fp32"], ["--amp", "bf16"], ["--symmetric"], ["--deterministic"]],
    ids=" ".join,
)
def test_a_diverged_run_keeps_its_last_finite_checkpoint(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A diverged run ends with exit code 5, names the step, and keeps a checkpoint from before it and finite ones only.

    Batch norm statistics overflow first, while loss and gradient are still finite.
    """
    often = ["--checkpoint-every", "1", "--log-every", "4", "--max-skipped-steps", "5"]
    assert train(tmp_path / "run", "--lr", "1e6", "--epochs", "5", *often, *flags) == ExitCode.DIVERGED
    (line,) = capsys.readouterr().err.splitlines()
    assert "not finite for" in line
    assert "lower --lr" in line
    first = int(line.partition("from step ")[2].split()[0])
    kept = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert [checkpoint.step_of(path) for path in kept] == [first - 2, first - 1]
    assert [not_finite(load_file(path)) for path in kept] == [[], []]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == ExitCode.DIVERGED


def test_parameters_that_overflow_are_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """State that is not finite is never written: the run ends with exit code 5, and the checkpoint before it stays."""
    assert train(tmp_path / "run", "--lr", "1e39", "--checkpoint-every", "2") == ExitCode.DIVERGED
    (line,) = capsys.readouterr().err.splitlines()
    assert "not finite since step 1 (model/" in line
    assert str(tmp_path / "run" / "checkpoints") in line
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.suffix != ".sha256"] == [
        "step-000000000.safetensors"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("encoder", ["query", "key"])
def test_infinite_statistics_with_a_finite_loss_skip_the_step(dtype: torch.dtype, encoder: str) -> None:
    """A step that makes batch norm statistics of either encoder infinite changes nothing, though its loss is finite."""
    step = make_step(dtype=dtype, bn_splits=2)
    with torch.no_grad():
        getattr(step.model, encoder).get_parameter("backbone.layer1.0.conv1.weight").mul_(1e25)
    before = whole_state(step)
    step(random_views(torch.Generator().manual_seed(3)), LR, EMA)
    assert changed(before, whole_state(step)) == []
    assert step.read_metrics()["skipped_steps"] == 1


def test_a_loss_pinned_at_chance_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that stays at that of chance, because nothing is learnt, is said in one line, once."""
    assert train(tmp_path / "run", "--moco-t", "1e9", "--epochs", "3", "--log-every", "1") == ExitCode.DONE
    assert capsys.readouterr().out.count("the loss has stayed at 2.833, which is chance, for 5 log entries") == 1


def test_a_loss_near_chance_is_not_pinned() -> None:
    """A loss that moves around chance, as at the start of training, is no reason for a warning."""
    watch = LossWatch(RunOptions(amp="fp32"), 1000, math.log(65537), lambda step: "")
    pinned = {"loss": math.log(65537), "steps": 1, "skipped_steps": 0, "consecutive_skipped": 0}
    for step in range(100):
        assert watch.check(step, pinned | {"loss": math.log(65537) + 0.02 * math.sin(step)}) is None
    assert [watch.check(step, pinned) is not None for step in range(2 * PINNED_LOGS)].count(True) == 1


def test_skipped_steps_do_not_replace_checkpoints(tmp_path: Path) -> None:
    """Checkpoints from before a run diverged are not replaced while all its steps are skipped."""
    writer = CheckpointWriter(tmp_path, keep=2)
    for step, skipped in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 3)):
        writer.start(step, {"x": torch.ones(2), SKIPPED: torch.tensor(float(skipped))}, {}, lambda: None)
        writer.wait()
    assert sorted(map(checkpoint.step_of, tmp_path.glob("*.safetensors"))) == [1, 2]
    writer.start(6, {"x": torch.ones(2), SKIPPED: torch.tensor(4.0)}, {}, lambda: None, last_chance=True)
    writer.wait()
    assert sorted(map(checkpoint.step_of, tmp_path.glob("*.safetensors"))) == [2, 6]
    writer.start(7, {"x": torch.tensor([1.0, math.nan])}, {}, lambda: None)
    with pytest.raises(DivergedError, match="not finite since step 7"):
        writer.wait()
    assert sorted(map(checkpoint.step_of, tmp_path.glob("*.safetensors"))) == [2, 6]
    writer.start(8, {"x": torch.ones(2), SKIPPED: torch.tensor(1.0)}, {}, lambda: None)  # step 7 has changed something
    writer.wait()
    writer.start(12, {"x": torch.ones(2), SKIPPED: torch.tensor(2.0)}, {}, lambda: None)  # the run is on its way out
    writer.wait()
    writer.close()
    assert sorted(map(checkpoint.step_of, tmp_path.glob("*.safetensors"))) == [6, 8]
