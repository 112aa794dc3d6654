"""Settings of the optimiser and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmoco.config.checks import check_types, require
from fastmoco.config.choices import Optimizer
from fastmoco.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule."""

    optimizer: Optimizer = "sgd"
    """Optimiser of the query encoder; it updates the key encoder's moving average in the same pass."""
    batch_size: int | Literal["auto"] | None = None
    """Images per step over all devices; auto: the largest that fits into memory, measured before training starts
    (None: from the closest recipe; less for few images)."""
    lr: float | None = None
    """Initial learning rate; the authors: 0.03 for a batch of 256 (None: from the closest recipe; see --lr-scaling)."""
    lr_scaling: Literal["linear", "none"] = "linear"
    """Without --lr: scale the closest recipe's learning rate linearly with the batch size, or leave it unchanged."""
    wd: float | None = None
    """Weight decay; the authors use 0.0001, and 0.0005 for CIFAR (None: from the closest recipe)."""
    sgd_momentum: float = 0.9
    """SGD momentum."""
    epochs: int | None = None
    """Number of epochs (None: from the closest recipe)."""
    cos: bool = False
    """Cosine decay of the learning rate; it ends at --final-lr."""
    final_lr: float = 0.0
    """Final learning rate of --cos."""
    schedule: tuple[int, ...] | None = None
    """Epochs at which the learning rate is divided by 10 (None: from the closest recipe, unless --cos is given)."""
    first_epoch: int = 0
    """Number of the first epoch in the schedule, 0 or 1: 1, as in the CIFAR demo, ends a cosine decay at --final-lr."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up of the learning rate from 0."""
    exclude_bn_from_wd: bool = False
    """Exclude biases and batch norm parameters from weight decay."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self, "batch_size", lambda v: v == "auto" or v >= 2, "2 or more", "batch norm needs more than one image"
        )
        require(self, "lr", lambda v: v > 0, "a number above 0", "the authors use 0.03 for a batch of 256")
        require(self, "final_lr", lambda v: v >= 0, "0 or more")
        require(self, "wd", lambda v: v >= 0, "0 or more", "the authors use 0.0001")
        require(self, "sgd_momentum", lambda v: 0 <= v < 1, "a number from 0 to below 1", "the authors use 0.9")
        require(self, "epochs", lambda v: v > 0, "1 or more")
        require(self, "first_epoch", lambda v: v in (0, 1), "0 or 1")
        require(self, "warmup_epochs", lambda v: v >= 0, "0 or more")
        rising = "epochs above 0 in rising order"
        require(self, "schedule", lambda v: list(v) == sorted({*v}) and all(e > 0 for e in v), rising)
        if self.cos and self.schedule is not None:
            raise ConfigError("--cos and --schedule both define the learning rate: drop one of the two")
        if self.final_lr and (self.schedule is not None or self.final_lr > (self.lr or self.final_lr)):
            conflict = "--schedule is set" if self.schedule is not None else f"the initial one, --lr, is {self.lr:g}"
            raise ConfigError(
                f"--final-lr is {self.final_lr:g}, the final value of a cosine decay, but {conflict}: use --cos with "
                "a --final-lr below --lr"
            )
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ConfigError(
                f"--warmup-epochs is {self.warmup_epochs}, expected fewer than the {self.epochs} of --epochs"
            )
