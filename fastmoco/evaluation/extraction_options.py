"""What every command that extracts features can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmoco.config.checks import require
from fastmoco.config.data import ImagesConfig


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions(ImagesConfig):
    """How features are computed."""

    arch: str | None = None
    """Expected architecture; another one is an error (None: that of the file)."""
    stem: Literal["imagenet", "cifar"] | None = None
    """Expected stem; another one is an error (None: that of the file)."""
    prefix: str | None = None
    """Which of several backbones in the file: part of their tensors' names, e.g. teacher (None: the query encoder)."""
    crop_size: int | None = None
    """Side of a view in pixels (None: that of training)."""
    feature_cache: bool = True
    """Use and fill the cache of features, below --data-root."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device (auto: cuda if available)."""
    amp: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the backbone (autocast); features are float32."""
    pipeline: Literal["auto", "resident", "torch", "dali", "ffcv"] = "auto"
    """Data pipeline that decodes and crops images (auto: by data and device)."""
    workers: int | None = None
    """Data loading workers, threads or processes (None: from the number of cores and images)."""
    cpu_threads: int | None = None
    """torch threads on a CPU (None: tuned to the fastest number while running)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "prefix", lambda v: v.strip(".") != "", "part of the names of tensors")
        require(self, "crop_size", lambda v: v >= 8, "8 pixels or more")
        require(self, "workers", lambda v: v >= 0, "0 or more")
        require(self, "cpu_threads", lambda v: 1 <= v <= 1024, "1 to 1024 threads")
