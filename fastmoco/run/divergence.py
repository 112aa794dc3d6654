"""Signs that a run no longer learns: steps that are skipped, state that is not finite, a loss that stays at chance."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from fastmoco.config import RunOptions
from fastmoco.distributed.world import World
from fastmoco.errors import CheckpointError, DivergedError
from fastmoco.run import checkpoint

PINNED_LOGS = 5  # log entries in a row at chance after which a run is warned about
PINNED = 1e-4  # largest relative distance from chance: a loss that moves at all is farther away
MOST_SKIPPED = 0.5  # of the steps of a window
SCALE_SEARCH = 16  # halvings of the loss scale, from its initial 2^16 down to 1: steps that float16 may skip


class LossWatch:
    """Judges a run at each log entry and after its last step.

    options      --max-skipped-steps is the window, and --amp tells whether the loss is scaled
    total_steps  of the run; a shorter run is one window
    chance_loss  the loss of embeddings that are all the same
    last_good    names the last checkpoint up to a step, as the end of a message
    """

    def __init__(
        self,
        options: RunOptions,
        total_steps: int,
        chance_loss: float,
        last_good: Callable[[int], str],
    ) -> None:
        self._window, self._chance_loss = min(options.max_skipped_steps, total_steps), chance_loss
        self._scaled, self._last_good = options.amp == "fp16", last_good
        other = {"fp32": "", "fp16": ", or use --amp bf16 or fp32"}.get(options.amp, ", or use --amp fp32")
        self._advice = f"lower --lr{other}"
        self._recent: deque[tuple[int, int]] = deque()  # (steps, skipped ones) of the log entries in the window
        self._scale_search = SCALE_SEARCH if options.amp == "fp16" else 0  # what is left of it
        self._pinned, self._warned = 0, False

    def check(
        self, step: int, metrics: Mapping[str, float], not_finite: Sequence[str] = (), *, last: bool = False
    ) -> str | None:
        """A warning, at most once in a run.

        step        completed steps
        metrics     of `TrainStep.read_metrics`
        not_finite  names of tensors of the state that are not finite
        last        whether the run ends here

        Raises DivergedError if the state is not finite; if more than half of a window of steps was skipped, besides
        the `SCALE_SEARCH` of float16; or if the last steps were: a whole window, or at the end of the run more than
        `tolerated_streak`.
        """
        streak = int(metrics["consecutive_skipped"])
        if not_finite:
            others = f" and {len(not_finite) - 1:,} more" if len(not_finite) > 1 else ""
            since = step - streak
            raise self._diverged(f"the state is not finite since step {since:,} ({not_finite[0]}{others})", since)
        steps, skipped = self._add(int(metrics["steps"]), int(metrics["skipped_steps"]))
        if streak >= self._window or (last and streak > tolerated_streak(self._scaled)):
            count = "1 step" if streak == 1 else f"{streak} steps"
            raise self._diverged(
                f"the loss, a gradient or a batch norm statistic was not finite for {count}, from step "
                f"{step - streak + 1:,} to step {step:,}",
                step - streak,
            )
        if steps >= self._window and skipped - self._scale_search > MOST_SKIPPED * steps:
            raise self._diverged(
                f"the loss, a gradient or a batch norm statistic was not finite for {skipped} of the {steps} steps up "
                f"to step {step:,}",
                step - steps,
            )
        return self._at_chance(step, metrics["loss"])

    def _add(self, steps: int, skipped: int) -> tuple[int, int]:
        """Add a log entry, and return the sums over the latest entries that make a window."""
        self._recent.append((steps, skipped))
        total = sum(entry[0] for entry in self._recent)
        while total - self._recent[0][0] >= self._window:
            past = self._recent.popleft()
            total -= past[0]
            self._scale_search = max(0, self._scale_search - past[1])
        return total, sum(entry[1] for entry in self._recent)

    def _diverged(self, what: str, good_step: int) -> DivergedError:
        return DivergedError(f"{what}: {self._advice}; {self._last_good(good_step)}")

    def _at_chance(self, step: int, loss: float) -> str | None:
        at_chance = math.isclose(loss, self._chance_loss, rel_tol=PINNED)
        self._pinned = self._pinned + 1 if at_chance else 0
        if self._pinned < PINNED_LOGS or self._warned:
            return None
        self._warned = True
        return (
            f"the loss has stayed at {self._chance_loss:.4g}, which is chance, for {PINNED_LOGS} log entries up to "
            f"step {step:,}: all images get the same embedding; {self._advice}"
        )


def tolerated_streak(scaled: bool) -> int:
    """Skipped steps in a row that say nothing: a loss scale that has grown is halved again; one batch may be odd."""
    return 4 if scaled else 1


def last_good(run: Path, world: World, finish_saving: Callable[[], object] | None, step: int) -> str:
    """Names the newest checkpoint of a run that is from this step or before, and verifies; the end of a message.

    finish_saving  waits for the save in progress, on rank 0

    All ranks call it, and rank 0 looks.
    """
    return world.on_main(lambda: _last_good(run, finish_saving, step))


def _last_good(run: Path, finish_saving: Callable[[], object] | None, step: int) -> str:
    if finish_saving is not None:
        with suppress(CheckpointError, DivergedError):
            finish_saving()
    folder = run / "checkpoints"
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        with suppress(CheckpointError):
            if checkpoint.step_of(path) <= step and checkpoint.verify(path):
                return f"the last good checkpoint is {path}"
    return f"no checkpoint in {folder} is from before that"


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors that hold an infinity or NaN."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    largest = {name: torch.linalg.vector_norm(tensor, ord=math.inf) for name, tensor in floating.items()}
    return [name for name, value in largest.items() if not math.isfinite(value)]
