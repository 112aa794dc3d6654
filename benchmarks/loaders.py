"""Data loading only: images/s, CPU time and memory of every pipeline, compared with a plain DataLoader.

    uv run python benchmarks/loaders.py --data cifar10 --crop-size 32 --batch-size 512 --out DIR
    uv run python benchmarks/loaders.py --quick

images/s are data set images, two views each. The baseline is `dataloader`: Pillow and torchvision's transforms in the
workers of a torch DataLoader. With colour, a batch is both finished views on the device; without, the uint8 crops. A
reading opens a new iterator, draws batches until its queues are in a steady state, then measures; cases are
interleaved. Files that fit in memory are read from the page cache after the first pass, not from the disk.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.measure.end_to_end import ENDLESS, Images
from benchmarks.measure.engines import augmentation_name, idle_memory
from benchmarks.measure.harness import (
    Reading,
    Stopwatch,
    environment,
    parse_names,
    ratios,
    run_script,
    summarise_all,
    values_of,
)
from benchmarks.measure.plain_crops import plain_crops
from benchmarks.measure.resources import cpu_seconds, device_memory, growth, memory_bytes
from benchmarks.measure.sample_data import describe_data, open_index
from benchmarks.measure.turns import attempt, describe, interleave, save
from benchmarks.reporting.page import make_console, print_blocks
from benchmarks.reporting.sections import section
from fastmoco.device import DTYPES, pick_amp, pick_device
from fastmoco.errors import ConfigError
from fastmoco.run.malloc import keep_freed_memory
from pipelines.augment.presets import AUGMENTATIONS
from pipelines.backends.select import PIPELINES, default_workers, open_pipeline, open_source
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from pipelines.workers import PREFETCHED

BASELINE = "dataloader"
SLOPE_EPOCHS = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Images/s of every input pipeline without a training step, compared with a plain DataLoader."""

    data: str | None = None
    """A folder, list, .beton file or named data set. Unset: generated JPEGs."""
    limit: int | None = None
    """Maximum number of images."""
    crop_size: int = 32
    """Side of the views in pixels."""
    batch_size: int = 512
    """Images per batch."""
    workers: int = default_workers()
    """Processes or threads of every pipeline."""
    backends: str = ",".join(PIPELINES)
    """Names of pipelines, separated by commas; the baseline is always measured."""
    colour: bool = True
    """Whole views; --no-colour stops at the uint8 crops."""
    seconds: float = 5.0
    """Duration of a reading, without warm-up."""
    repetitions: int = 5
    """Number of interleaved rounds."""
    slope: bool = False
    """Measure the growth of memory over ten epochs instead of the speed."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """Small batches and short readings, to check that everything works."""
    out: Path | None = None
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Case:
    """A pipeline that is open. `memory` is what it occupies, including the data set if it is kept in memory."""

    name: str
    batches: Callable[[], Iterator[object]]
    close: Callable[[], None]
    open_s: float
    memory: Reading


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table, write the result and return it. Raises ConfigError and DataError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, batch_size=min(64, settings.batch_size), seconds=0.5, repetitions=2)
    names = _names(settings.backends)
    device = pick_device(settings.device)
    result: dict[str, Any] = {"benchmark": "pipelines", "environment": environment(device)}
    kind = ("slope" if settings.slope else "views" if settings.colour else "crops") + f"-{settings.crop_size}px"
    path = None if settings.out is None else settings.out / f"pipelines-{kind}.json"
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
        index = open_index(settings.data, settings.crop_size, settings.limit, Path(scratch), settings.batch_size)
        result |= {"settings": asdict(settings) | {"out": None}, "data": describe_data(index), "left_out": {}}
        cases = _open_all(names, Images(index, Path(scratch), settings.workers), settings, device, result["left_out"])
        try:
            result["open_s"] = {case.name: case.open_s for case in cases}
            (_slopes if settings.slope else _speeds)(cases, settings, device, result, path)
        finally:
            for case in cases:
                case.close()
    print_blocks(console, section(result))
    return result


def _names(backends: str) -> list[str]:
    names = parse_names(backends, PIPELINES, "--backends") if backends else []
    return [name for name in names if name != BASELINE] + [BASELINE]


def _open_all(
    names: list[str], images: Images, settings: Settings, device: torch.device, left_out: dict[str, str]
) -> list[Case]:
    """The pipelines that run here; the reasons why others do not go into `left_out`. Raises ConfigError for none."""
    opened = [
        attempt(lambda name=name: _open(name, images.index_for(name), settings, device), name, left_out)
        for name in names
    ]
    cases = [case for case in opened if case is not None]
    if not cases:
        raise ConfigError(f"no pipeline runs here: {describe(left_out)}")
    return cases


def _open(name: str, index: ImageIndex, settings: Settings, device: torch.device) -> Case:
    side, workers = settings.crop_size, settings.workers
    planner = Planner(
        index.sizes,
        seed=0,
        batch_size=settings.batch_size,
        augmentation=AUGMENTATIONS[augmentation_name(side)],
        shuffle_keys=True,
    )
    before, began = idle_memory(device), time.perf_counter()
    source = open_source(name, index, side, device, workers)
    try:
        dtype = DTYPES[pick_amp("auto", device)]
        pipeline = open_pipeline(name, index, planner, source, side, device, dtype, workers)
        open_s = time.perf_counter() - began

        def batches() -> Iterator[object]:
            if settings.colour:
                return pipeline.views(0, ENDLESS)
            if name == BASELINE:
                return plain_crops(index, planner, side, device, workers)
            return source.crops(planner.plans(0, ENDLESS))

        first = batches()
        next(first)  # compiles, starts workers, fills the page cache, and fails if the pipeline does not work
        del first
    except BaseException:
        source.close()
        raise
    return Case(name, batches, source.close, open_s, growth(before, idle_memory(device)))


def _speeds(
    cases: list[Case], settings: Settings, device: torch.device, result: dict[str, Any], path: Path | None
) -> None:
    """Measure all cases, and write the result after every round."""

    def write(readings: dict[str, list[Reading]], rounds: int) -> None:
        baseline = values_of(readings[BASELINE]) if BASELINE in readings else None
        result["cases"] = {
            name: summarise_all(of_case)
            | {"ratio_to_control": None if baseline is None else ratios(values_of(of_case), baseline)}
            for name, of_case in readings.items()
        }
        save(path, result, rounds, settings.repetitions)

    runs = {case.name: lambda case=case: _measure(case, settings, device) for case in cases}
    interleave(runs, settings.repetitions, left_out=result["left_out"], after_round=write)


def _measure(case: Case, settings: Settings, device: torch.device) -> Reading:
    """One reading, of whole rounds of the workers, which finish their batches at about the same time."""
    before = idle_memory(device)
    keep_freed_memory(device.type == "cpu" and case.name != BASELINE)  # as the trainer does
    batches = case.batches()
    # Batches that are queued when the first one arrives were made before the clock starts: consume them first.
    warm_up = 2 if settings.quick else (PREFETCHED + 1) * max(1, settings.workers)
    for _ in range(warm_up):
        next(batches)
    round_of = max(1, settings.workers)
    watch, count, cpu_s = Stopwatch(device), 0, cpu_seconds()
    watch.start()
    began = time.perf_counter()
    while count % round_of or time.perf_counter() - began < settings.seconds:
        next(batches)
        count += 1
    elapsed_s = watch.stop()
    images = count * settings.batch_size
    used_s = cpu_seconds() - cpu_s
    grown = growth(before, _peak(device))
    del batches
    keep_freed_memory(False)
    return {
        "images_per_s": images / elapsed_s,
        "cpu_ms_per_image": 1e3 * used_s / images,
        "batches": count,
        **{key: case.memory[key] + grown[key] for key in grown},
    }


def _peak(device: torch.device) -> Reading:
    """Memory in use, and of torch's allocator at its peak since the last `idle_memory`."""
    memory = {"host_bytes": float(memory_bytes()), **device_memory(device)}
    if device.type == "cuda":
        memory["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
    return memory


def _slopes(
    cases: list[Case], settings: Settings, device: torch.device, result: dict[str, Any], path: Path | None
) -> None:
    """Measure one case after the other, and write the result after each."""
    result["cases"], steps = {}, result["data"]["images"] // settings.batch_size
    for done, case in enumerate(cases, 1):
        slope = attempt(lambda case=case: _slope(case, steps), case.name, result["left_out"])
        if slope is not None:
            result["cases"][case.name] = slope
        save(path, result, done, len(cases))


def _slope(case: Case, steps_per_epoch: int) -> dict[str, Any]:
    """Memory of all processes after the first epoch and each of ten more, and the slope of a linear fit to the ten."""
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
