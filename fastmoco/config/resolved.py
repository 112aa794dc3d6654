"""A configuration in which everything that training needs has a value."""

# pyright: reportGeneralTypeIssues=false
# A field that is redeclared without its default is one that must be given, which pyright has no other name for.

from __future__ import annotations

from dataclasses import dataclass

from fastmoco.config.choices import Arch, Aug
from fastmoco.config.run_config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig
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
    """What `run.resolve.resolve` makes of a RunConfig: fields that depend on the data are narrowed to not None.

    The fields that still may be None have a meaning there: no limit, no step schedule, a linear head, the folder's
    usual name, one process. A None anywhere else raises ConfigError.
    """

    data: ResolvedData
    augment: ResolvedAugment
    model: ResolvedModel
    optim: ResolvedOptim
    run: ResolvedRun

    @staticmethod
    def of(config: RunConfig) -> ResolvedConfig:
        """The same values. Raises ConfigError where one that training needs is None."""
        return ResolvedConfig(
            data=ResolvedData(**vars(config.data)),
            augment=ResolvedAugment(**vars(config.augment)),
            model=ResolvedModel(**vars(config.model)),
            optim=ResolvedOptim(**vars(config.optim)),
            run=ResolvedRun(**vars(config.run)),
            scale=config.scale,
        )
