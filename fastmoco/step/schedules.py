"""Learning rate and EMA momentum: pure functions of the step number, so that a resumed run needs no state.

Steps are counted from 0; the epoch is `step // steps_per_epoch`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastmoco.config import ResolvedConfig
from fastmoco.errors import ConfigError

LR_SCHEDULES = ("cosine", "step", "constant")
EMA_SCHEDULES = ("constant", "cosine")


def lr_at(
    step: int,
    *,
    schedule: str,
    base_lr: float,
    epochs: int,
    steps_per_epoch: int,
    milestones: Sequence[int] = (),
    warmup_epochs: int = 0,
    final_lr: float = 0.0,
    first_epoch: int = 0,
    per_step: bool = False,
) -> float:
    """The learning rate of a step.

        cosine    final_lr + (base_lr − final_lr) · ½ (1 + cos(π (e − w) / (E − w)))
        step      base_lr · 0.1 ^ (number of milestones ≤ e)
        constant  base_lr

    The first is from Loshchilov and Hutter 2017, equation 5, without restarts.

    e is the epoch, an integer that counts from `first_epoch`: 0 in the authors' ImageNet code, 1 in their CIFAR demo,
    whose last epoch has the rate final_lr. With `per_step` it is a fraction, step / steps_per_epoch more than
    `first_epoch`. E = epochs, w = warmup_epochs. In the first w epochs the rate is
    base_lr · (step + 1) / (w · steps_per_epoch), which reaches base_lr in the last warm-up step (Goyal et al. 2017,
    section 2.2).
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    epoch = first_epoch + (step / steps_per_epoch if per_step else step // steps_per_epoch)
    if schedule == "cosine":
        return final_lr + (base_lr - final_lr) * _half_cosine((epoch - warmup_epochs) / (epochs - warmup_epochs))
    if schedule == "step":
        return base_lr * 0.1 ** sum(milestone <= epoch for milestone in milestones)
    if schedule == "constant":
        return base_lr
    raise ConfigError(f"unknown learning rate schedule {schedule!r}; expected one of {', '.join(LR_SCHEDULES)}")


def ema_momentum_at(step: int, *, schedule: str, base: float, total_steps: int) -> float:
    """The momentum m of the key encoder, θ_k ← m θ_k + (1 − m) θ_q, at the end of a step.

    constant  base
    cosine    1 − (1 − base) · ½ (1 + cos(π step / total_steps)), from base to 1       Grill et al. 2020, section 3.3
    """
    if schedule == "constant":
        return base
    if schedule == "cosine":
        return 1.0 - (1.0 - base) * _half_cosine(step / total_steps)
    raise ConfigError(f"unknown EMA schedule {schedule!r}; expected one of {', '.join(EMA_SCHEDULES)}")


def _half_cosine(progress: float) -> float:
    """½ (1 + cos(π progress)): 1 at progress 0, 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class Rates:
    """Learning rate and EMA momentum of a run, at every step."""

    def __init__(self, config: ResolvedConfig, steps_per_epoch: int) -> None:
        self._optim, self._model, self._steps_per_epoch = config.optim, config.model, steps_per_epoch

    def lr(self, step: int) -> float:
        optim = self._optim
        return lr_at(
            step,
            schedule="cosine" if optim.cos else "step" if optim.schedule else "constant",
            base_lr=optim.lr,
            epochs=optim.epochs,
            steps_per_epoch=self._steps_per_epoch,
            milestones=optim.schedule or (),
            warmup_epochs=optim.warmup_epochs,
            final_lr=optim.final_lr,
            first_epoch=min(optim.first_epoch, optim.epochs - 1),
        )

    def ema_momentum(self, step: int) -> float:
        model, total_steps = self._model, self._steps_per_epoch * self._optim.epochs
        schedule = "cosine" if model.moco_m_cos else "constant"
        return ema_momentum_at(step, schedule=schedule, base=model.moco_m, total_steps=total_steps)
