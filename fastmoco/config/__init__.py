"""The configuration of a run. Imports only errors and the registry of fastmoco, and no torch: `--help` is instant."""

from fastmoco.config.augment import AugmentConfig
from fastmoco.config.choices import Arch, Aug
from fastmoco.config.data import DataConfig, ImagesConfig
from fastmoco.config.model import ModelConfig
from fastmoco.config.optim import OptimConfig
from fastmoco.config.resolved import ResolvedConfig
from fastmoco.config.resume import COMPARED_BY_EFFECT, FREE_ON_RESUME, differences
from fastmoco.config.run_config import RunConfig
from fastmoco.config.run_options import RunOptions, ScaleOptions

__all__ = [
    "COMPARED_BY_EFFECT",
    "FREE_ON_RESUME",
    "Arch",
    "Aug",
    "AugmentConfig",
    "DataConfig",
    "ImagesConfig",
    "ModelConfig",
    "OptimConfig",
    "ResolvedConfig",
    "RunConfig",
    "RunOptions",
    "ScaleOptions",
    "differences",
]
