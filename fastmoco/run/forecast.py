"""Estimate of the time left in a run: available within its first seconds, and updated at every step."""

from __future__ import annotations

from collections import deque

# Seconds of training.
WARM_UP_S = 3.0  # ignored: allocators, workers and the number of threads settle
MIN_WINDOW_S = 4.0  # then measured before the first estimate
WINDOW_S = 30.0  # most recent time used for the rate: the load of the machine changes


class Forecast:
    """Time left, from the duration of the latest steps and of the last evaluation.

    steps, steps_per_epoch  of the whole run
    evaluate_every          epochs between evaluations (the last epoch always has one); 0 for none
    evaluation_s            duration of an evaluation, to be set after each
    """

    def __init__(self, steps: int, steps_per_epoch: int, evaluate_every: int) -> None:
        self.evaluation_s = 0.0
        self._steps, self._steps_per_epoch, self._every = steps, steps_per_epoch, evaluate_every
        self._marks: deque[tuple[int, float]] = deque()
        self._last = (0, 0.0)

    def begin(self, step: int) -> None:
        """Start after `step` completed steps."""
        self._last = (step, 0.0)

    def mark(self, step: int, training_s: float) -> bool:
        """Record that the device has completed `step` steps after `training_s` seconds, evaluations excluded.

        Returns whether this makes the first estimate available: within seconds, or after one step that takes longer.
        """
        known, marks, last = self.left_s is not None, self._marks, self._last
        self._last = (step, training_s)
        if training_s < WARM_UP_S:
            return False
        if not marks and training_s - last[1] >= WARM_UP_S + MIN_WINDOW_S:
            marks.append(last)
        marks.append((step, training_s))
        while len(marks) > 3 and training_s - marks[1][1] >= WINDOW_S:
            marks.popleft()
        return self.left_s is not None and not known

    @property
    def left_s(self) -> float | None:
        """Estimated seconds from the last mark to the end of the run; None if it is too early."""
        if len(self._marks) < 2:
            return None
        (first, began_s), (last, ended_s) = self._marks[0], self._marks[-1]
        if ended_s - began_s < MIN_WINDOW_S:
            return None
        step_s = (ended_s - began_s) / (last - first)
        return (self._steps - last) * step_s + self._evaluations_left(last) * self.evaluation_s

    def _evaluations_left(self, step: int) -> int:
        done, epochs = step // self._steps_per_epoch, self._steps // self._steps_per_epoch
        if not self._every or done >= epochs:
            return 0
        return epochs // self._every - done // self._every + (epochs % self._every > 0)
