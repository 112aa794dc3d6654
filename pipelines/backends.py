"""Names of pipelines → pipelines; what `auto` takes, and why."""

from __future__ import annotations

import os

import torch

from pipelines.dataloader import DataLoaderPipeline
from pipelines.errors import BackendMissingError
from pipelines.image_index import ImageIndex
from pipelines.plans import Planner
from pipelines.resident_crops import SHARE_OF_FREE_MEMORY, ResidentCrops, free_memory_bytes, resident_bytes
from pipelines.torch_crops import TorchCrops
from pipelines.two_view import TwoViewPipeline
from pipelines.views import CropSource

SOURCES = ("resident", "torch")
PIPELINES = (*SOURCES, "dataloader")
Pipeline = TwoViewPipeline | DataLoaderPipeline


def choose(name: str, index: ImageIndex, device: torch.device) -> tuple[str, str]:
    """The pipeline that `name` (one of PIPELINES, or auto) stands for, and the reason in words."""
    if name != "auto":
        return name, "as asked for"
    needed, free = resident_bytes(index), free_memory_bytes(device)
    sizes = f"{len(index):,} decoded images take {needed / 2**20:,.0f} MiB of {free / 2**20:,.0f} MiB free on {device}"
    if needed <= SHARE_OF_FREE_MEMORY * free:
        return "resident", f"{sizes}"
    return "torch", f"{sizes}: too many to keep there"


def default_workers() -> int:
    """One worker for every core this process may use."""
    return len(os.sched_getaffinity(0))


def open_source(name: str, index: ImageIndex, side: int, device: torch.device, workers: int) -> CropSource:
    """The crop source of a pipeline. The control has none of its own; it is evaluated through `torch`."""
    if name == "resident":
        return ResidentCrops(index, side, device, workers)
    if name in ("torch", "dataloader"):
        return TorchCrops(index, side, device, workers)
    raise BackendMissingError(f"--pipeline {name} is unknown: expected one of auto, {', '.join(PIPELINES)}")


def open_pipeline(
    name: str,
    index: ImageIndex,
    planner: Planner,
    source: CropSource,
    side: int,
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
) -> Pipeline:
    """Two views of every image of the index, in batches."""
    if name == "dataloader":
        return DataLoaderPipeline(index, planner, side, device, dtype, workers)
    return TwoViewPipeline(planner, source, device, dtype)
