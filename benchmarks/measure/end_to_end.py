"""A loader and a training step, measured together or alone in the same loop, so that their rates can be compared.

A case without an engine measures the loader alone; a case with the engine's synthetic views measures the step alone.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure.engines import Engine, augmentation_name, idle_memory
from benchmarks.measure.harness import Reading, Stopwatch
from benchmarks.measure.plain import Task
from benchmarks.measure.power import Sampler, nvml_query
from benchmarks.measure.resources import (
    cpu_seconds,
    growth,
    memory_bytes,
    nvml_device,
    peak_resident_bytes,
    resident_bytes,
    used_bytes,
)
from benchmarks.measure.sample_data import as_beton
from fastmoco.errors import DivergedError
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.run.throughput import StepClock, mark_on
from pipelines.augment.presets import AUGMENTATIONS
from pipelines.backends.baseline import DataLoaderPipeline
from pipelines.backends.select import open_pipeline, open_source
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from pipelines.views import Views
from pipelines.workers import worker_options

PLAIN = "plain"  # the baseline loader with the plain step
ENDLESS = 10**9  # steps
LOG_EVERY = 50  # steps between two reads of the loss, as in training
MAX_STRETCH = 4  # a reading waits for whole rounds of the workers, up to this many times the requested duration


@dataclass(frozen=True)
class Case:
    """A loader that is open, and the engine that trains on its batches.

    round_of  batches that arrive at about the same time: one per worker, if each worker makes whole batches
    memory    what the open loader occupies
    """

    batches: Callable[[], Iterator[Views]]
    engine: Engine | None
    batch_size: int
    round_of: int = 1
    memory: Reading = field(default_factory=dict)
    open_s: float = 0.0
    close: Callable[[], None] = lambda: None


class Images:
    """An index, and the same images in a `.beton` file, which is written when FFCV first needs it."""

    def __init__(self, index: ImageIndex, scratch: Path, workers: int) -> None:
        self.index, self._scratch, self._workers = index, scratch, workers

    @cached_property
    def _beton(self) -> ImageIndex:
        return as_beton(self.index, self._scratch, self._workers)

    def index_for(self, pipeline: str) -> ImageIndex:
        return self._beton if pipeline == "ffcv" else self.index


def step_only(engine: Engine, task: Task) -> Case:
    """The engine on its synthetic views."""
    return Case(lambda: itertools.cycle(engine.synthetic), engine, task.batch_size)


def start_fork_server(device: torch.device) -> None:
    """Start the server that forks all DataLoader workers, and import torch in it: its memory belongs to no case."""
    list(DataLoader([0], **worker_options(1, device)))  # type: ignore[arg-type]


def open_case(
    name: str,
    images: Images,
    task: Task,
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
    engine: Engine | None,
) -> Case:
    """Open a pipeline of `pipelines.backends.select`, or `plain`, and fetch its first batch.

    Raises BackendMissingError and DataError.
    """
    index = images.index_for(name)
    before, began = idle_memory(device), time.perf_counter()
    planner = Planner(
        index.sizes,
        seed=0,
        batch_size=task.batch_size,
        augmentation=AUGMENTATIONS[augmentation_name(task.side)],
        shuffle_keys=task.bn_splits != 1 and name != PLAIN,  # the plain step shuffles its keys itself
    )
    if name == PLAIN:
        pipeline = PlainLoader(index, planner, task.side, device, torch.float32, workers)
    else:
        source = open_source(name, index, task.side, device, workers)
        pipeline = open_pipeline(name, index, planner, source, task.side, device, dtype, workers)
    with ExitStack() as on_error:
        on_error.callback(pipeline.close)
        batches = pipeline.views(0, ENDLESS)
        next(batches)  # compiles, starts workers, fills the page cache, and fails if the pipeline does not work
        del batches
        open_s = time.perf_counter() - began
        on_error.pop_all()
    return Case(
        lambda: pipeline.views(0, ENDLESS),
        engine,
        task.batch_size,
        max(1, workers) if isinstance(pipeline, DataLoaderPipeline) else 1,
        growth(before, idle_memory(device)),
        open_s,
        pipeline.close,
    )


class PlainLoader(DataLoaderPipeline):
    """The baseline with batches as they are collated, float32 and NCHW, for the plain step."""

    def _move(self, images: Tensor) -> Tensor:
        return images.to(self._device, non_blocking=True)


def measure(case: Case, seconds: float, device: torch.device) -> Reading:
    """One reading from a new iterator, over at least `seconds` and whole rounds of the workers.

    images_per_s, step_ms    data set images, two views each; wall time
    data_wait_percent        share of the host's time spent waiting for a batch. On a GPU the host runs ahead, and
                             waiting costs nothing until the device is idle: compare with the step alone instead
    cpu_ms_per_image         CPU time of all processes
    host_bytes, reserved_bytes, nvml_bytes  memory of step and loader, and the peak of the reading on top:
                             of all processes, of torch's allocator, and of the GPU as the driver reports it
    gpu_utilisation_percent, power_w, joules_per_image  from NVML, if available

    Raises DivergedError if the loss is not finite at the end.
    """
    before, engine = idle_memory(device), case.engine
    keep_freed_memory(engine is not None and engine.keeps_memory)
    batches = case.batches()
    _warm_up(case, batches, seconds)
    nvml, watch, count, loss, cpu_s = nvml_device(device), Stopwatch(device), 0, 0.0, cpu_seconds()
    with ExitStack() as stack:
        if nvml is not None:
            torch.cuda.synchronize(device)  # energy of the warm-up is not counted
        sampler = None if nvml is None else stack.enter_context(Sampler(nvml_query(nvml)))
        watch.start()
        clock, began = StepClock(case.batch_size, mark=mark_on(device)), time.perf_counter()
        for views in clock.steps(batches):
            count += 1
            if engine is not None:
                engine.step(views)
                if count % LOG_EVERY == 0:
                    loss = engine.read_loss()
            so_far_s = time.perf_counter() - began
            if so_far_s >= seconds and (count % case.round_of == 0 or so_far_s >= MAX_STRETCH * seconds):
                break
        elapsed_s = watch.stop()
        rates = clock.read()
    images = count * case.batch_size
    used_s = cpu_seconds() - cpu_s
    gpu = {} if sampler is None else sampler.reading()
    memory = _peak_growth(before, gpu.pop("nvml_used_bytes", None), device)
    for occupied in (case.memory, {} if engine is None else engine.memory):
        memory = {key: memory[key] + occupied.get(key, 0.0) for key in memory}
    if engine is not None and count % LOG_EVERY:
        loss = engine.read_loss()
    if not math.isfinite(loss):
        raise DivergedError(f"the loss is {loss} after {count} steps: measure with other images, or a larger batch")
    if "joules" in gpu:
        gpu["joules_per_image"] = gpu.pop("joules") / images
    return {
        "images_per_s": images / elapsed_s,
        "step_ms": 1e3 * elapsed_s / count,
        "data_wait_percent": rates.data_wait_percent,
        "cpu_ms_per_image": 1e3 * used_s / images,
        "steps": count,
        **memory,
        **gpu,
    }


def _warm_up(case: Case, batches: Iterator[Views], seconds: float) -> None:
    """Consume the batches that are queued when the first one arrives, one per worker: they were made before the clock
    starts. If the step is so slow that this takes long, it does not wait for its loader."""
    wanted, began = max(3, 2 * case.round_of), time.perf_counter()
    for count, views in enumerate(batches, 1):
        if case.engine is not None:
            case.engine.step(views)
        if count >= wanted or (count >= 3 and time.perf_counter() - began > MAX_STRETCH * seconds):
            break


def _peak_growth(before: Reading, nvml_used_bytes: float | None, device: torch.device) -> Reading:
    """Growth since `before` up to the peak. The peak of other processes is unknown: their current memory counts."""
    peak = {"host_bytes": float(memory_bytes() + peak_resident_bytes() - resident_bytes())}
    if device.type == "cuda":
        peak["reserved_bytes"] = float(torch.cuda.max_memory_reserved(device))
        peak["nvml_bytes"] = float(used_bytes(device)) if nvml_used_bytes is None else nvml_used_bytes
    return growth(before, peak)
