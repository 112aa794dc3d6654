"""A configuration with a value for everything that training needs."""

# pyright: reportGeneralTypeIssues=false
# Fields are made required by redeclaring them without a default, which pyright reports.

from __future__ import annotations

from dataclasses import dataclass

from fastmoco.config.augment import AugmentConfig
from fastmoco.config.choices import Arch, Aug
from fastmoco.config.data import DataConfig
from fastmoco.config.model import ModelConfig
from fastmoco.config.optim import OptimConfig
from fastmoco.config.run_config import RunConfig
from fastmoco.config.run_options import RunOptions


@dataclass(frozen=True, kw_only=True)
class ResolvedData(DataConfig):
    workers: int


@dataclass(frozen=True, kw_only=True)
class ResolvedAugment(AugmentConfig):
    crop_size: int
    aug: Aug


@dataclass(frozen=True, kw_only=True)
class ResolvedModel(ModelConfig):
    arch: Arch
    moco_k: int
    moco_m: float
    moco_t: float
    bn_splits: int


@dataclass(frozen=True, kw_only=True)
class ResolvedOptim(OptimConfig):
    batch_size: int
    lr: float
    wd: float
    epochs: int


@dataclass(frozen=True, kw_only=True)
class ResolvedRun(RunOptions):
    knn_every: int


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(RunConfig):
    """The result of `run.resolve.resolve`: fields whose default depends on the data are no longer None.

    In the remaining optional fields None has a meaning: no limit, no step schedule, a linear head, random weights, the
    default folder, one process, the preset's own value of the augmentation. A None in any other field raises
    ConfigError.
    """

    data: ResolvedData
    augment: ResolvedAugment
    model: ResolvedModel
    optim: ResolvedOptim
    run: ResolvedRun

    @staticmethod
    def of(config: RunConfig) -> ResolvedConfig:
        """Narrow a configuration. Raises ConfigError if a required value is None."""
        return ResolvedConfig(
            data=ResolvedData(**vars(config.data)),
            augment=ResolvedAugment(**vars(config.augment)),
            model=ResolvedModel(**vars(config.model)),
            optim=ResolvedOptim(**vars(config.optim)),
            run=ResolvedRun(**vars(config.run)),
            scale=config.scale,
        )
