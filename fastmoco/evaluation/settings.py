"""Training settings of the probes and label amounts, parsed from flags before torch is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from fastmoco.errors import ConfigError
from fastmoco.step.schedules import lr_at

Schedule = Literal["step", "cosine", "constant"]
MILESTONES = (0.6, 0.8)  # fractions of the epochs: 60 and 80 of the authors' 100

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
_COUNT = re.compile(r"(\d+)-per-class")


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """SGD settings of a probe. The defaults are the authors' (He et al. 2020, section 4.1, and their code).

    normalize  divide each feature vector by its L2 norm
    """

    lr: float = 30.0
    epochs: int = 100
    batch_size: int = 256
    schedule: Schedule = "step"
    momentum: float = 0.9
    weight_decay: float = 0.0
    normalize: bool = False

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, constant within an epoch."""
        return lr_at(
            step,
            schedule=self.schedule,
            base_lr=self.lr,
            epochs=self.epochs,
            steps_per_epoch=steps_per_epoch,
            milestones=[max(1, round(fraction * self.epochs)) for fraction in MILESTONES],
        )


# Our choice, with the weight decay of pretraining.
FINE_TUNE = Sgd(lr=0.01, epochs=20, batch_size=128, schedule="cosine", weight_decay=1e-4)


@dataclass(frozen=True)
class Amount:
    """Number of labels per class: a fraction of its images, or a count."""

    text: str
    fraction: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Parse `1%` or `5-per-class`. Raises ConfigError."""
        stripped = text.strip()
        if (match := _PERCENT.fullmatch(stripped)) and 0 < float(match[1]) <= 100:
            return cls(stripped, fraction=float(match[1]) / 100)
        if (match := _COUNT.fullmatch(stripped)) and int(match[1]) > 0:
            return cls(stripped, count=int(match[1]))
        raise ConfigError(
            f"--labels has {text!a}, expected a percentage such as 1% or 10%, or a count such as 5-per-class"
        )

    def of(self, images: int) -> int:
        """Number of labels for a class with this many images; a fraction is rounded to the nearest integer."""
        return self.count if self.count is not None else math.floor((self.fraction or 0) * images + 0.5)
