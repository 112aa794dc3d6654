"""How probes are trained and on how many labels: what flags are turned into before torch is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from fastmoco.errors import ConfigError
from fastmoco.step.schedules import lr_at

Schedule = Literal["step", "cosine", "constant"]
MILESTONES = (0.6, 0.8)  # of the epochs: 60 and 80 of the authors' 100

_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
_COUNT = re.compile(r"(\d+)-per-class")


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """How a probe is trained. The defaults are the authors' (He et al. 2020, section 4.1, and their code)."""

    lr: float = 30.0
    epochs: int = 100
    batch_size: int = 256
    schedule: Schedule = "step"
    momentum: float = 0.9
    weight_decay: float = 0.0

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, the same during a whole epoch."""
        return lr_at(
            step,
            schedule=self.schedule,
            base_lr=self.lr,
            epochs=self.epochs,
            steps_per_epoch=steps_per_epoch,
            milestones=[max(1, round(part * self.epochs)) for part in MILESTONES],
        )


# Ours, with the weight decay of pretraining.
FINE_TUNE = Sgd(lr=0.01, epochs=20, batch_size=128, schedule="cosine", weight_decay=1e-4)


@dataclass(frozen=True)
class Amount:
    """How many labels of a class: a share of its images, or a number."""

    text: str
    share: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Amount:
        """From `1%` or `5-per-class`. Raises ConfigError."""
        word = text.strip()
        if (match := _SHARE.fullmatch(word)) and 0 < float(match[1]) <= 100:
            return cls(word, share=float(match[1]) / 100)
        if (match := _COUNT.fullmatch(word)) and int(match[1]) > 0:
            return cls(word, count=int(match[1]))
        raise ConfigError(f"--labels has {text!a}, expected a share such as 1% or 10%, or a number such as 5-per-class")

    def of(self, images: int) -> int:
        """How many of so many images of a class; a share is rounded to the nearest number."""
        return self.count if self.count is not None else math.floor((self.share or 0) * images + 0.5)
