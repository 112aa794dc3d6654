"""The configuration of a run. Imports only errors and the registry of fastmoco, and no torch: `--help` is instant."""

from fastmoco.config.choices import Arch, Aug
from fastmoco.config.resolved import ResolvedConfig
from fastmoco.config.run_config import (
    FREE_ON_RESUME,
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    differences,
)
from fastmoco.config.run_options import RunOptions, ScaleOptions

__all__ = [
    "FREE_ON_RESUME",
    "Arch",
    "Aug",
    "AugmentConfig",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "ResolvedConfig",
    "RunConfig",
    "RunOptions",
    "ScaleOptions",
    "differences",
]
