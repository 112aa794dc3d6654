"""When a run logs, evaluates and saves: functions of the number of completed steps."""

from __future__ import annotations

from collections.abc import Callable

from fastmoco.config import ResolvedConfig

SAVE_INTERVAL_S = 60.0  # between checkpoints without --checkpoint-every, since an epoch may be shorter than a save


class Due:
    """What a run does after a step, by its settings."""

    def __init__(self, config: ResolvedConfig, steps_per_epoch: int) -> None:
        self._run, self._steps_per_epoch = config.run, steps_per_epoch
        self._total_steps = steps_per_epoch * config.optim.epochs

    def log(self, step: int) -> bool:
        return self._ends_epoch(step) or step % self._run.log_every == 0

    def evaluation(self, step: int) -> bool:
        every = self._run.knn_every
        if not every or not step or not self._ends_epoch(step):
            return False
        return (step // self._steps_per_epoch) % every == 0 or step == self._total_steps

    def checkpoint(self, step: int, saved_s_ago: Callable[[], float]) -> bool:
        """saved_s_ago: seconds since the checkpoint before."""
        every = self._run.checkpoint_every
        if every is not None:
            return step % every == 0 or step == self._total_steps
        return self._ends_epoch(step) and (step == self._total_steps or saved_s_ago() >= SAVE_INTERVAL_S)

    def _ends_epoch(self, step: int) -> bool:
        return step % self._steps_per_epoch == 0
