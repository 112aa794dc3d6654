"""Signs that a run no longer learns: steps that are skipped, state that is not finite, a loss that stays at chance."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastmoco.errors import DivergedError

PINNED_LOGS = 5  # log entries in a row at chance after which a run is warned about
PINNED = 1e-4  # largest relative distance from chance: a loss that moves at all is farther away


class LossWatch:
    """Follows the metrics of each log entry.

    max_skipped  consecutive skipped steps that end the run
    chance_loss  the loss of embeddings that are all the same
    amp          number format of the encoders, for the advice
    """

    def __init__(self, *, max_skipped: int, chance_loss: float, amp: str) -> None:
        self._max_skipped, self._chance_loss = max_skipped, chance_loss
        self._advice = "lower --lr" if amp == "fp32" else "lower --lr, or use --amp fp32"
        self._pinned, self._warned = 0, False

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning, at most once in a run. Raises DivergedError after too many skipped steps.

        step     completed steps
        metrics  of `TrainStep.read_metrics`
        """
        skipped = int(metrics["consecutive_skipped"])
        if skipped >= self._max_skipped:
            raise DivergedError(
                f"the loss, a gradient or a batch norm statistic was not finite for {skipped} steps, from step "
                f"{step - skipped + 1:,} to step {step:,}: {self._advice}; the last checkpoint is from before them"
            )
        at_chance = math.isclose(metrics["loss"], self._chance_loss, rel_tol=PINNED)
        self._pinned = self._pinned + 1 if at_chance else 0
        if self._pinned < PINNED_LOGS or self._warned:
            return None
        self._warned = True
        return (
            f"the loss has stayed at {self._chance_loss:.4g}, which is chance, for {PINNED_LOGS} log entries up to "
            f"step {step:,}: all images get the same embedding; {self._advice}"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the floating-point tensors that hold an infinity or NaN."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    largest = {name: torch.linalg.vector_norm(tensor, ord=math.inf) for name, tensor in floating.items()}
    return [name for name, value in largest.items() if not math.isfinite(value)]
