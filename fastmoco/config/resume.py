"""What may change when a run is resumed, and settings that are written in more than one way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmoco.config.run_config import RunConfig
from pipelines.data.names import NAMES
from pipelines.files import absolute

FREE_ON_RESUME = frozenset(
    {"data_root", "workers", "bad_images", "truncated", "train_folder", "no_labels"}  # the images are compared
    | {"out", "overwrite", "resume", "resume_from", "allow_changed", "allow_changed_data", "allow_large_queue"}
    | {"log_every", "checkpoint_every", "keep_checkpoints", "tensorboard", "wandb", "mlflow"}
    | {"knn_every", "knn_k", "knn_t", "knn_on"}
    | {"deterministic", "compile", "kernels", "cuda_graph", "stem_format", "prefetch", "check", "tune", "device"}
    | {"checkpoint_activations", "cpu_threads", "gpus", "dist_timeout", "paranoid", "max_skipped_steps"}
    | {"lr_scaling", "aug_plus", "test_folder"}  # the first two: how lr and aug were chosen
    | {"init", "init_prefix"}  # the hash of the weights is compared
)
"""Settings that affect the weights by rounding at most, or permit something."""

COMPARED_BY_EFFECT = frozenset(
    {"data", "limit", "pipeline", "order_buffer", "mlp", "head", "bank_m"}
    | {"aug", "crop_scale_min", "hflip", "vflip", "color_jitter", "grayscale", "blur", "solarize"}
    | {"mean", "std", "normalization"}
    | {"epochs", "lr", "final_lr", "cos", "schedule", "first_epoch", "warmup_epochs", "moco_m", "moco_m_cos"}
)
"""Settings of which only the effect must be the same: the images, the views, the rates of the steps so far.

`fastmoco.run.changes` compares them. The weights depend on each of the other settings.
"""

ADAPTED_TO_IMAGES = frozenset({"moco_k", "batch_size", "lr", "bn_splits"})
"""Settings of a recipe that may be reduced where there are fewer images (`fastmoco.run.resolve`)."""


def differences(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """All fields that differ, as (field, value in a, value in b), in the order of --help."""
    other = b.flat()
    return [(name, value, other[name]) for name, value in a.flat().items() if value != other[name]]


def as_settings(config: RunConfig) -> RunConfig:
    """What a run is made of, without the switches that hold for one start: --resume, --overwrite, --allow-changed."""
    return config.replace(resume=False, overwrite=False, allow_changed=(), allow_changed_data=False)


def absolute_data(data: Sequence[str]) -> tuple[str, ...]:
    """`--data` with absolute paths, so that it means the same in every working directory; names stay as they are."""
    return tuple(name if name in NAMES else absolute(name) for name in data)


def rescaled(schedule: tuple[int, ...], epochs: int, wanted: int) -> tuple[int, ...]:
    """The same fractions of another number of epochs."""
    return tuple(sorted({max(1, round(epoch * wanted / epochs)) for epoch in schedule}))


def run_of(path: Path) -> Path | None:
    """The run that a path is the folder of, or that a checkpoint at this path belongs to; None if it is of no run."""
    for folder in (path, path.parent.parent if path.parent.name == "checkpoints" else path):
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None
