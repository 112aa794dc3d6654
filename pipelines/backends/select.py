"""From the name of a backend to its pipeline; what `auto` chooses, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Protocol

import torch

from pipelines.backends.two_view import TwoViewPipeline
from pipelines.data.index import ImageIndex
from pipelines.data.resident_pixels import SHARE_OF_FREE_MEMORY, tightest
from pipelines.errors import BackendMissingError
from pipelines.plan.planner import Planner
from pipelines.platforms import usable_cpus
from pipelines.registry import BACKENDS, load
from pipelines.views import CropSource, Views

PIPELINES = tuple(BACKENDS)


class Pipeline(Protocol):
    """Both views of every image of a run, in batches."""

    planner: Planner

    def views(self, start: int, stop: int) -> Iterator[Views]:
        """The batches of steps `start` to `stop` - 1."""
        ...

    def close(self) -> None: ...


def choose(name: str, index: ImageIndex, device: torch.device) -> tuple[str, str]:
    """The backend that `name` (one of PIPELINES, or auto) stands for, and the reason.

    Raises BackendMissingError for one that cannot read images of so many channels.
    """
    if name != "auto":
        _check_channels(name, index)
        return name, "requested"
    needed, free, where = tightest(index, device)
    sizes = f"{len(index):,} decoded images take {needed / 2**20:,.0f} MiB of {free / 2**20:,.0f} MiB free on {where}"
    if needed <= SHARE_OF_FREE_MEMORY * free:
        return "resident", sizes
    if index.channels != 3:
        return "torch", f"{sizes}: too many to keep there, and the others read three channels only"
    if index.records is not None and index.records.in_beton and importlib.util.find_spec("ffcv"):
        return "ffcv", f"{sizes}: too many to keep there, and they are in a .beton file"
    if device.type == "cuda" and importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        return "dali", f"{sizes}: too many to keep there, and DALI decodes on the device"
    return "torch", f"{sizes}: too many to keep there"


def _check_channels(name: str, index: ImageIndex) -> None:
    if name in BACKENDS and BACKENDS[name].only_rgb and index.channels != 3:
        able = " or ".join(other for other, backend in BACKENDS.items() if not backend.only_rgb)
        raise BackendMissingError(
            f"--pipeline {name} reads images of three channels only, and --channels is {index.channels}: use "
            f"--pipeline {able}"
        )


def default_workers() -> int:
    """One worker for every core that this process may use."""
    return usable_cpus()


def open_source(name: str, index: ImageIndex, side: int, device: torch.device, workers: int) -> CropSource:
    """The crop source of a backend. Raises BackendMissingError where it does not exist, is not installed, or reads no
    images of so many channels."""
    if name not in BACKENDS:
        raise BackendMissingError(f"--pipeline {name} is unknown: expected one of auto, {', '.join(BACKENDS)}")
    _check_channels(name, index)
    return load(BACKENDS[name].source)(index, side, device, workers)


def open_pipeline(
    name: str,
    index: ImageIndex,
    planner: Planner,
    source: CropSource,
    side: int,
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
    triton: bool | None = None,
    prefetch: bool = True,
) -> Pipeline:
    """Two views of every image of the index, in batches; `source` is what `open_source` gave for that name.

    triton, prefetch  as of `TwoViewPipeline`
    """
    own = BACKENDS[name].pipeline
    if own is not None:
        return load(own)(index, planner, side, device, dtype, workers)
    if index.channels != 3:
        triton = False  # the kernels are for three
    return TwoViewPipeline(planner, source, device, dtype, triton, prefetch)
