"""How long the rest of a run takes on this machine: known within its first seconds, and corrected as it goes on."""

from __future__ import annotations

from collections import deque

SETTLED_S = 3.0  # of training, in which allocators, workers and the number of threads settle
ENOUGH_S = 4.0  # of training after that, and two steps or more
WINDOW_S = 30.0  # of the newest training: other work on the machine comes and goes


class Forecast:
    """From the times of the newest steps and of the last evaluation.

    steps, steps_per_epoch  of the whole run
    evaluate_every          epochs between two evaluations, the last epoch always has one; 0 for none
    evaluation_s            how long one takes, to be set after each
    """

    def __init__(self, steps: int, steps_per_epoch: int, evaluate_every: int) -> None:
        self.evaluation_s = 0.0
        self._steps, self._steps_per_epoch, self._every = steps, steps_per_epoch, evaluate_every
        self._marks: deque[tuple[int, float]] = deque()

    def mark(self, step: int, training_s: float) -> bool:
        """The device has done so many steps of the run, after so many seconds of training, evaluations left out.

        Returns whether this is the first time that the rest can be told.
        """
        if training_s < SETTLED_S:
            return False
        known, marks = self.left_s is not None, self._marks
        marks.append((step, training_s))
        while len(marks) > 3 and training_s - marks[1][1] >= WINDOW_S:
            marks.popleft()
        return self.left_s is not None and not known

    @property
    def left_s(self) -> float | None:
        """Seconds from the last mark to the end of the run; None where it is too early to tell."""
        if len(self._marks) < 2:
            return None
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        if last - first < 2 or ended - began < ENOUGH_S:
            return None
        return (self._steps - last) * (ended - began) / (last - first) + self._evaluations(last) * self.evaluation_s

    def _evaluations(self, step: int) -> int:
        """How many are still to come."""
        done, epochs = step // self._steps_per_epoch, self._steps // self._steps_per_epoch
        if not self._every or done >= epochs:
            return 0
        return epochs // self._every - done // self._every + (epochs % self._every > 0)
