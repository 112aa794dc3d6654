"""When a run counts as diverged: skipped steps, state that is not finite, and how such a run ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from fastmoco.cli import main
from fastmoco.config import RunConfig
from fastmoco.distributed.world import World
from fastmoco.errors import DivergedError, ExitCode
from fastmoco.run.divergence import LossWatch, last_good
from fastmoco.step.schedules import Rates
from fastmoco.step.train_step import TrainStep
from tests.run.test_train import RESIDENT
from tests.step.test_step_parity import make_step

ALONE = World(torch.device("cpu"))

QUICK = [*RESIDENT, "--knn-every", "0", "--no-tensorboard", "--cpu-threads", "1", "--check", "off"]
GOOD, BAD = False, True


def verdict(
    skips: Sequence[bool], *, amp: str = "bf16", log_every: int = 50, window: int = 50, before: int = 0
) -> str | None:
    """Where a run with these steps is said to have diverged: "step N", or None.

    before  steps that an earlier process made, which was stopped
    """
    total = before + len(skips)
    options = RunConfig().replace(amp=amp, max_skipped_steps=window).run
    watch = LossWatch(options, total, math.log(65537), lambda step: "")
    streak = since = skipped = 0
    for step, skip in enumerate(skips, before + 1):
        streak = streak + 1 if skip else 0
        since, skipped = since + 1, skipped + skip
        if step % log_every == 0 or step == total:
            metrics = {"loss": 1.0, "steps": since, "skipped_steps": skipped, "consecutive_skipped": streak}
            try:
                watch.check(step, metrics, last=step == total)
            except DivergedError:
                return f"step {step}"
            since = skipped = 0
    return None


@pytest.mark.parametrize(
    ("skips", "expected"),
    [
        ([GOOD] * 200, None),
        ([BAD] * 3, "step 3"),  # fewer steps than the window
        ([GOOD] * 2 + [BAD] * 5, "step 7"),
        ([GOOD] * 100 + [BAD] * 3, "step 103"),  # at the end, of many
        ([GOOD] * 103 + [BAD], None),  # one batch says nothing
        ([GOOD] * 100 + [BAD] * 50 + [GOOD] * 500, "step 150"),
        ([GOOD] * 100 + [BAD] * 20 + [GOOD] * 500, None),
        ([GOOD] * 100 + [BAD, BAD, GOOD] * 100, "step 150"),  # never a long streak
        ([BAD, BAD, GOOD] * 6, "step 18"),
        ([GOOD, BAD, GOOD] * 100, None),
    ],
)
def test_a_run_diverges_by_the_share_of_skipped_steps_or_by_how_it_ends(
    skips: list[bool], expected: str | None
) -> None:
    assert verdict(skips) == expected


@pytest.mark.parametrize(
    ("skips", "expected"),
    [
        ([BAD] * 12 + [GOOD] * 8, None),  # the scale was too large by 2^12, and the run is short
        ([BAD] * 16 + [GOOD] * 34, None),
        ([GOOD] * 3_000 + [BAD], None),  # the scale has grown
        ([BAD] * 12, "step 12"),  # a run that was too short to find its scale has learnt nothing
        ([GOOD] * 20 + [BAD] * 5, "step 25"),
        ([BAD, BAD, BAD, GOOD] * 100, "step 100"),
    ],
)
def test_the_search_for_the_loss_scale_is_no_divergence(skips: list[bool], expected: str | None) -> None:
    assert verdict(skips, amp="fp16") == expected


def test_the_end_of_a_resumed_run_is_judged_by_what_is_known() -> None:
    """A single step after a resume is not a window, however it went."""
    assert verdict([BAD], before=49) is None
    assert verdict([BAD, BAD], before=48) == "step 50"


@pytest.mark.parametrize("log_every", [1, 7, 50, 1000])
def test_the_log_interval_does_not_change_the_verdict(log_every: int) -> None:
    assert verdict([GOOD] * 20 + [BAD] * 200, log_every=log_every) is not None
    assert verdict([GOOD] * 90 + [BAD] * 8 + [GOOD] * 22, log_every=log_every) is None


# ---- state -----------------------------------------------------------------------------------------------------------


def of_query(step: TrainStep) -> torch.Tensor:
    return step.model.query.get_parameter("backbone.conv1.weight")


def of_key(step: TrainStep) -> torch.Tensor:
    return step.model.key.get_parameter("backbone.layer4.1.conv2.weight")


def of_key_statistics(step: TrainStep) -> torch.Tensor:
    return step.model.key.get_buffer("backbone.layer2.0.bn1.running_var")


def of_queue(step: TrainStep) -> torch.Tensor:
    return step.dictionary.state_dict()["keys"]


def of_momentum(step: TrainStep) -> torch.Tensor:
    return next(iter(step.update.state().values()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", [of_query, of_key, of_key_statistics, of_queue, of_momentum])
def test_one_value_anywhere_in_the_state_is_found(part: Callable[[TrainStep], torch.Tensor], value: float) -> None:
    step = make_step(bn_splits=2)
    assert step.read_metrics(check_state=True)["state_not_finite"] == 0
    with torch.no_grad():
        tensor = part(step)
        tensor[tuple(side - 1 for side in tensor.shape)] = value
    assert step.read_metrics(check_state=True)["state_not_finite"] == 1
    assert "state_not_finite" not in step.read_metrics()


# ---- whole runs ------------------------------------------------------------------------------------------------------


def train(out: Path, *flags: str) -> int:
    return main(["train", *QUICK, "--out", str(out), *flags])


def explode_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that ruins the parameters in one step, and leaves them finite."""
    original = Rates.lr
    monkeypatch.setattr(Rates, "lr", lambda self, s: 1e25 if s >= step else original(self, s))


def test_a_last_epoch_that_diverges_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three skipped steps of eight are few, but they are the last: exit code 5, naming the checkpoint before."""
    explode_from(4, monkeypatch)
    assert train(tmp_path / "run", "--checkpoint-every", "4") == ExitCode.DIVERGED
    (line,) = capsys.readouterr().err.splitlines()
    assert "not finite for 3 steps, from step 6 to step 8: lower --lr;" in line
    assert line.endswith(
        f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-000000004.safetensors'}"
    )
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 5, line.partition("error: ")[2])
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    assert names == ["step-000000000.safetensors", "step-000000004.safetensors"]


def test_a_key_encoder_that_is_not_finite_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of it shows in the losses of a run whose only log entry is at its end."""
    original = TrainStep.read_metrics

    def spoilt(self: TrainStep, **options: bool) -> dict[str, float]:
        with torch.no_grad():
            self.model.key.get_parameter("backbone.conv1.weight")[3, 0, 0, 0] = math.nan
        return original(self, **options)

    monkeypatch.setattr(TrainStep, "read_metrics", spoilt)
    assert train(tmp_path / "run", "--epochs", "1", "--log-every", "1000") == ExitCode.DIVERGED
    (line,) = capsys.readouterr().err.splitlines()
    assert "the state is not finite since step 4 (model/key.backbone.conv1.weight)" in line
    assert not (tmp_path / "run" / "backbone.safetensors").exists()


def test_a_run_without_a_good_checkpoint_says_so(tmp_path: Path) -> None:
    assert last_good(tmp_path, ALONE, None, 7) == f"no checkpoint in {tmp_path / 'checkpoints'} is from before that"


def test_the_last_good_checkpoint_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged checkpoint, and one from after the last good step, are not named."""
    run = tmp_path / "run"
    assert train(run, "--epochs", "1", "--checkpoint-every", "1", "--keep-checkpoints", "9") == ExitCode.DONE
    (run / "checkpoints" / "step-000000003.safetensors").write_bytes(bytes(100))
    assert last_good(run, ALONE, None, 3).endswith("step-000000002.safetensors")
    assert last_good(run, ALONE, None, 4).endswith("step-000000004.safetensors")


def test_a_checkpoint_that_is_being_saved_counts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, "--epochs", "1", "--checkpoint-every", "2") == ExitCode.DONE
    newest = run / "checkpoints" / "step-000000004.safetensors"
    unfinished = newest.rename(tmp_path / "unfinished")
    assert not last_good(run, ALONE, None, 4).endswith(newest.name)
    assert last_good(run, ALONE, lambda: unfinished.rename(newest), 4).endswith(newest.name)
