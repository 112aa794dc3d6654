"""Types of options whose choices are the keys of a registry: a `Literal` at run time, `str` for type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastmoco.registry import ARCHITECTURES, EXPORT_TARGETS, FAMILIES, KERNELS, OBJECTIVES, OPTIMIZERS, STEMS
from pipelines.augment.presets import AUGMENTATIONS
from pipelines.registry import BACKENDS

KnnSpace = Literal["features", "output", "both"]

if TYPE_CHECKING:
    Arch = Aug = ExportTo = Objective = Optimizer = Pipeline = str
    AutoKernels = AutoPipeline = AutoStem = str
else:
    Arch = Literal[*ARCHITECTURES, *(f"{prefix}NAME" for prefix in FAMILIES)]  # NAME is any name
    Aug = Literal[*AUGMENTATIONS]
    ExportTo = Literal[*EXPORT_TARGETS]
    Objective = Literal[*OBJECTIVES]
    Optimizer = Literal[*OPTIMIZERS]
    Pipeline = Literal[*BACKENDS]
    AutoKernels = Literal["auto", *KERNELS]
    AutoPipeline = Literal["auto", *BACKENDS]
    AutoStem = Literal["auto", *STEMS]
