"""Loader only: how many images/s every pipeline delivers, and at what price, side by side with a plain DataLoader.

    uv run python benchmarks/pipelines.py --data cifar10 --crop-size 32 --batch-size 512 --out benchmarks/results
    uv run python benchmarks/pipelines.py --quick

images/s are images of the data set, two views each. The baseline is `dataloader`: Pillow and torchvision's transforms
in the workers of a torch DataLoader. With colour, a batch is both finished views on the device; without, the uint8
crops. A case opens a new iterator, draws batches until its queues are in their steady state, then measures; the cases
take turns. Files that fit in memory come from the page cache after the first pass, not from the disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, where this file hides the package

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.measure.harness import (
    Reading,
    Stopwatch,
    chosen,
    environment,
    make_console,
    ratios,
    run_script,
    summarise,
    take_turns,
    write_json,
)
from benchmarks.measure.plain_crops import plain_crops
from benchmarks.measure.resources import cpu_seconds, device_memory, memory_bytes
from benchmarks.measure.sample_data import SMALL, as_beton, open_index, stored_bytes
from benchmarks.reporting.pipelines_table import show_slopes, show_speeds
from fastmoco.device import DTYPES, pick_amp, pick_device
from fastmoco.errors import ConfigError
from fastmoco.run.malloc import keep_freed_memory
from pipelines.augment.presets import CIFAR, V2
from pipelines.backends.select import PIPELINES, default_workers, open_pipeline, open_source
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError, DataError
from pipelines.plan.planner import Planner
from pipelines.workers import PREFETCHED

CONTROL = "dataloader"
ENDLESS = 10**9  # steps
SLOPE_EPOCHS = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Images/s of every input pipeline, with nothing behind it, against a plain DataLoader."""

    data: str | None = None
    """A folder, list, .beton file or named data set. Unset: JPEGs drawn for the occasion."""
    limit: int | None = None
    """At most so many images of it."""
    crop_size: int = 32
    """Side of the views in pixels."""
    batch_size: int = 512
    """Images a batch."""
    workers: int = default_workers()
    """Processes or threads of every pipeline."""
    backends: str = ",".join(PIPELINES)
    """Which, separated by commas; the baseline is always measured."""
    colour: bool = True
    """Whole views; --no-colour stops at the uint8 crops."""
    seconds: float = 5.0
    """How long each reading takes, without its warm-up."""
    repetitions: int = 5
    """Rounds in which every pipeline has its turn."""
    slope: bool = False
    """Instead of speed, how memory grows over ten epochs of each pipeline."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """Small batches, short readings: whether it works, not how fast it is."""
    out: Path | None = None
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Case:
    """One pipeline, opened. `memory` is what opening it took: the whole data set, where that is kept in memory."""

    name: str
    batches: Callable[[], Iterator[object]]
    close: Callable[[], None]
    open_s: float
    memory: Reading


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measures, prints a table and returns what it writes. Raises ConfigError and DataError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, batch_size=min(64, settings.batch_size), seconds=0.5, repetitions=2)
    names = _names(settings.backends)
    device = pick_device(settings.device)
    result: dict[str, Any] = {"benchmark": "pipelines", "environment": environment(device)}
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
        index = open_index(settings.data, settings.crop_size, settings.limit, Path(scratch))
        if len(index) < settings.batch_size:
            raise ConfigError(f"--batch-size {settings.batch_size} is more than the {len(index)} images: use fewer")
        result |= {
            "settings": asdict(settings) | {"out": None},
            "data": {"images": len(index), "stored_bytes": stored_bytes(index), "description": index.describe()},
        }
        cases, left_out = _open_all(names, index, settings, device, Path(scratch))
        try:
            result["left_out"] = left_out
            result["open_s"] = {case.name: case.open_s for case in cases}
            if settings.slope:
                result["cases"] = {case.name: _slope(case, len(index) // settings.batch_size) for case in cases}
            else:
                result["cases"] = _speeds(cases, settings, device)
        finally:
            for case in cases:
                case.close()
    (show_slopes if settings.slope else show_speeds)(console, result)
    if settings.out is not None:
        kind = ("slope" if settings.slope else "views" if settings.colour else "crops") + f"-{settings.crop_size}px"
        write_json(settings.out / f"pipelines-{kind}.json", result)
    return result


def _names(backends: str) -> list[str]:
    names = chosen(backends, PIPELINES, "--backends") if backends else []
    return [name for name in names if name != CONTROL] + [CONTROL]


def _open_all(
    names: list[str], index: ImageIndex, settings: Settings, device: torch.device, scratch: Path
) -> tuple[list[Case], dict[str, str]]:
    """The pipelines that can run here, and why the others cannot."""
    cases, left_out = [], {}
    for name in names:
        try:
            images = as_beton(index, scratch, settings.workers) if name == "ffcv" else index
            cases.append(_open(name, images, settings, device))
        except (BackendMissingError, DataError) as error:
            if name == CONTROL:
                raise
            left_out[name] = str(error)
    return cases, left_out


def _open(name: str, index: ImageIndex, settings: Settings, device: torch.device) -> Case:
    side, workers = settings.crop_size, settings.workers
    planner = Planner(
        index.sizes,
        seed=0,
        batch_size=settings.batch_size,
        augmentation=CIFAR if side <= SMALL else V2,
        shuffle_keys=True,
    )
    before, began = _memory(device), time.perf_counter()
    source = open_source(name, index, side, device, workers)
    dtype = DTYPES[pick_amp("auto", device)]
    pipeline = open_pipeline(name, index, planner, source, side, device, dtype, workers)
    open_s = time.perf_counter() - began

    def batches() -> Iterator[object]:
        if settings.colour:
            return pipeline.views(0, ENDLESS)
        if name == CONTROL:
            return plain_crops(index, planner, side, device, workers)
        return source.crops(planner.plans(0, ENDLESS))

    case = Case(name, batches, source.close, open_s, _growth(before, _memory(device)))
    try:
        first = batches()
        next(first)  # compiles, starts the fork server, fills the page cache; and tells whether it works at all
        del first
    except BaseException:
        source.close()
        raise
    return case


def _speeds(cases: list[Case], settings: Settings, device: torch.device) -> dict[str, Any]:
    runs = {case.name: lambda case=case: _measure(case, settings, device) for case in cases}
    readings = take_turns(runs, settings.repetitions)
    control = [reading["images_per_s"] for reading in readings[CONTROL]]
    found: dict[str, Any] = {}
    for name, taken in readings.items():
        found[name] = {key: summarise([reading[key] for reading in taken]) for key in taken[0]}
        found[name]["ratio_to_control"] = ratios([reading["images_per_s"] for reading in taken], control)
    return found


def _measure(case: Case, settings: Settings, device: torch.device) -> Reading:
    """One reading. Batches come in whole rounds of the workers, which finish theirs at about the same time."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = _memory(device)
    keep_freed_memory(device.type == "cpu" and case.name != CONTROL)  # as the trainer does
    batches = case.batches()
    # What lies in the queues when the first batch arrives was made before the clock started: use it up first.
    warm_up = 2 if settings.quick else (PREFETCHED + 1) * max(1, settings.workers)
    for _ in range(warm_up):
        next(batches)
    whole = max(1, settings.workers)
    watch, count, cpu_s = Stopwatch(device), 0, cpu_seconds()
    watch.start()
    began = time.perf_counter()
    while count % whole or time.perf_counter() - began < settings.seconds:
        next(batches)
        count += 1
    elapsed_s = watch.stop()
    images = count * settings.batch_size
    used_s = cpu_seconds() - cpu_s
    growth = _growth(before, _memory(device))
    del batches
    keep_freed_memory(False)
    return {
        "images_per_s": images / elapsed_s,
        "cpu_ms_per_image": 1e3 * used_s / images,
        "batches": count,
        **{key: case.memory[key] + growth[key] for key in growth},
    }


def _memory(device: torch.device) -> Reading:
    found = {"host_bytes": float(memory_bytes()), **device_memory(device)}
    if device.type == "cuda":
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _growth(before: Reading, after: Reading) -> Reading:
    """Of a source and an iterator; never below zero, where others' garbage was collected in the meantime."""
    return {key: max(0.0, after[key] - before[key]) for key in before}


def _slope(case: Case, steps_per_epoch: int) -> dict[str, Any]:
    """Memory of all processes at the end of each of ten epochs, after a first one, and the line of best fit."""
    batches, sizes = case.batches(), []
    for _ in range(SLOPE_EPOCHS + 1):
        for _ in range(steps_per_epoch):
            next(batches)
        gc.collect()
        sizes.append(memory_bytes() / 1e6)
    fit = statistics.linear_regression(range(SLOPE_EPOCHS), sizes[1:])
    return {"slope_mb_per_epoch": fit.slope, "memory_mb": sizes}


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
