"""Dynamic loss scaling for float16."""

from __future__ import annotations

import torch
from torch import Tensor


class LossScaler:
    """Dynamic loss scaling, kept on the device (Micikevicius et al. 2018, section 3.2).

    The scale is halved after a step that overflows, and doubled after 2,000 consecutive steps that do not.
    """

    GROWTH_INTERVAL = 2000
    RANGE = (1.0, 2.0**24)

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), 2.0**16, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, ok: Tensor) -> None:
        """Adjust the scale; ok, a 0-d bool on the device, is whether the step was finite."""
        good_steps = torch.where(ok, self.good_steps + 1, 0)
        grow = good_steps == self.GROWTH_INTERVAL
        scale = torch.where(ok, torch.where(grow, self.scale * 2.0, self.scale), self.scale * 0.5)
        self.scale.copy_(scale.clamp(*self.RANGE))
        self.good_steps.copy_(torch.where(grow, 0, good_steps))
