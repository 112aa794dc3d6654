"""A loader with a training step behind it, measured while it trains; and each of the two without the other.

A case is a loader and an engine. Without an engine it measures the loader alone; with the engine's synthetic views for
a loader, the step alone. All three run through the same loop, so that their rates may be divided by each other.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure.harness import Reading, Stopwatch
from benchmarks.measure.ladder import synthetic_views
from benchmarks.measure.plain import PlainStep, Task
from benchmarks.measure.power import Sampler, nvml_query
from benchmarks.measure.resources import (
    cpu_seconds,
    memory_bytes,
    nvml_device,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
)
from benchmarks.measure.sample_data import SMALL, as_beton
from fastmoco.config import ResolvedConfig
from fastmoco.device import DTYPES
from fastmoco.distributed.world import World
from fastmoco.errors import DivergedError
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.run.state import build_state
from fastmoco.run.throughput import StepClock
from fastmoco.step.cuda_graph import GraphedStep
from pipelines.augment.presets import AUGMENTATIONS
from pipelines.backends.baseline import DataLoaderPipeline
from pipelines.backends.select import open_pipeline, open_source
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from pipelines.views import Views
from pipelines.workers import worker_options

PLAIN = "plain"  # the baseline with the step that most people run behind it
ENDLESS = 10**9  # steps
LOG_EVERY = 50  # steps between two reads of the loss, as in training
MOST = 4  # a reading waits for whole rounds of the workers, up to so many times as long as was requested


@dataclass(frozen=True)
class Engine:
    """A training step that is built and warmed up.

    read_loss     the mean loss since it was last called, or of the last step; waits for the device
    synthetic     batches that it can be fed with in place of a loader
    keeps_memory  whether malloc keeps what is freed (`fastmoco.run.malloc`), as the trainer has it on a CPU
    held          memory that it keeps between steps
    """

    step: Callable[[Views], object]
    read_loss: Callable[[], float]
    synthetic: list[Views]
    keeps_memory: bool
    held: Reading
    warm_up_s: float


@dataclass(frozen=True)
class Case:
    """A loader that is open, what it holds, and the engine that trains on its batches.

    round_of  batches that come at about the same time: one of every worker, where each makes its own
    """

    batches: Callable[[], Iterator[Views]]
    engine: Engine | None
    batch_size: int
    round_of: int = 1
    held: Reading = field(default_factory=dict)
    open_s: float = 0.0
    close: Callable[[], None] = lambda: None


class Images:
    """What is loaded: an index, and the same images in a `.beton` file once FFCV asks for them."""

    def __init__(self, index: ImageIndex, scratch: Path, workers: int) -> None:
        self.index, self._scratch, self._workers = index, scratch, workers

    @cached_property
    def _beton(self) -> ImageIndex:
        return as_beton(self.index, self._scratch, self._workers)

    def of(self, name: str) -> ImageIndex:
        return self._beton if name == "ffcv" else self.index


def augmentation_name(side: int) -> str:
    """The recipes' for views of this side."""
    return "cifar" if side <= SMALL else "v2"


def our_engine(config: ResolvedConfig, task: Task, images: ImageIndex, device: torch.device) -> Engine:
    """The step as the trainer builds it from a resolved configuration: CUDA graph, kernels and all."""
    synthetic = synthetic_views(task, device, DTYPES[config.run.amp], channels_last=True)
    before, began = held(device), time.perf_counter()
    train_step = build_state(config, World(device), images).train_step
    step = train_step if config.run.cuda_graph == "off" else GraphedStep(train_step, synthetic[0])

    def run(views: Views) -> None:
        step(views, task.lr, task.ema_momentum)

    def read_loss() -> float:
        return train_step.read_metrics()["loss"]

    warm_up_s = _warm_up(run, read_loss, synthetic, began)
    return Engine(run, read_loss, synthetic, device.type == "cpu", growth(before, held(device)), warm_up_s)


def plain_engine(task: Task, device: torch.device) -> Engine:
    """Eager, float32 and NCHW, reading its loss in every step."""
    synthetic = synthetic_views(task, device, torch.float32, channels_last=False)
    before, began = held(device), time.perf_counter()
    torch.manual_seed(0)
    step, losses = PlainStep(task, device), deque[float](maxlen=1)

    def run(views: Views) -> None:
        losses.append(step(views))

    def read_loss() -> float:
        return losses[0]

    warm_up_s = _warm_up(run, read_loss, synthetic, began)
    return Engine(run, read_loss, synthetic, False, growth(before, held(device)), warm_up_s)


def _warm_up(
    run: Callable[[Views], None], read_loss: Callable[[], float], synthetic: list[Views], began: float
) -> float:
    """Seconds since `began`, when two steps are done."""
    for views in synthetic[:2]:
        run(views)
    read_loss()
    return time.perf_counter() - began


def step_only(engine: Engine, task: Task) -> Case:
    """The engine on its synthetic views."""
    return Case(lambda: itertools.cycle(engine.synthetic), engine, task.batch_size)


def start_fork_server(device: torch.device) -> None:
    """What all DataLoaders fork their workers from, with torch in it: no case is charged with its memory."""
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
    """A pipeline of `pipelines.backends.select` or `plain`, which has delivered its first batch.

    Raises BackendMissingError and DataError.
    """
    index = images.of(name)
    before, began = held(device), time.perf_counter()
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
        next(batches)  # compiles, starts the fork server, fills the page cache; and tells whether it works at all
        del batches
        open_s = time.perf_counter() - began
        on_error.pop_all()
    return Case(
        lambda: pipeline.views(0, ENDLESS),
        engine,
        task.batch_size,
        max(1, workers) if isinstance(pipeline, DataLoaderPipeline) else 1,
        growth(before, held(device)),
        open_s,
        pipeline.close,
    )


class PlainLoader(DataLoaderPipeline):
    """The baseline with its batches as they are collated: float32 and NCHW, which the plain step wants."""

    def _move(self, images: Tensor) -> Tensor:
        return images.to(self._device, non_blocking=True)


def measure(case: Case, seconds: float, device: torch.device) -> Reading:
    """One reading of a new iterator, of `seconds` or more in whole rounds of the workers.

    images_per_s, step_ms    of the data set, two views each; wall time
    data_wait_percent        of the host's time, in which it asked for a batch. On a GPU the host is ahead, and waiting
                             costs nothing until the device has no more to do: the share of the step's own rate tells
    cpu_ms_per_image         processor time of all processes
    host_bytes, reserved_bytes, nvml_bytes  memory that step and loader hold, and what the reading took on top at
                             its peak: of all processes, of torch's allocator, and of the GPU as the driver sees it
    gpu_utilisation_percent, power_w, joules_per_image  as NVML says; where there is NVML

    Raises DivergedError where the loss is not finite at the end: such steps are not worth measuring.
    """
    before, engine = held(device), case.engine
    keep_freed_memory(engine is not None and engine.keeps_memory)
    batches = case.batches()
    # What was ready when the first batch came, one of every worker, was made before the clock started: use it up. A
    # step so slow that this takes long is not waiting for its loader.
    warm_up, began = max(3, 2 * case.round_of), time.perf_counter()
    for n, views in enumerate(batches, 1):
        if engine is not None:
            engine.step(views)
        if n >= warm_up or (n >= 3 and time.perf_counter() - began > MOST * seconds):
            break
    nvml, watch, count, loss, cpu_s = nvml_device(device), Stopwatch(device), 0, 0.0, cpu_seconds()
    with ExitStack() as stack:
        if nvml is not None:
            torch.cuda.synchronize(device)  # what the warm-up launched is not to be paid for here
        sampler = None if nvml is None else stack.enter_context(Sampler(nvml_query(nvml)))
        watch.start()
        clock, began = StepClock(case.batch_size), time.perf_counter()
        for views in clock.steps(batches):
            count += 1
            if engine is not None:
                engine.step(views)
                if count % LOG_EVERY == 0:
                    loss = engine.read_loss()
            so_far_s = time.perf_counter() - began
            if so_far_s >= seconds and (count % case.round_of == 0 or so_far_s >= MOST * seconds):
                break
        elapsed_s = watch.stop()
        rates = clock.read()
    images = count * case.batch_size
    used_s = cpu_seconds() - cpu_s
    on_gpu = {} if sampler is None else sampler.reading()
    memory = _peak(before, on_gpu.pop("nvml_used_bytes", None), device)
    for part in (case.held, {} if engine is None else engine.held):
        memory = {key: memory[key] + part.get(key, 0.0) for key in memory}
    if engine is not None and count % LOG_EVERY:
        loss = engine.read_loss()
    if not math.isfinite(loss):
        raise DivergedError(f"the loss is {loss} after {count} steps: measure with other images, or a larger batch")
    if "joules" in on_gpu:
        on_gpu["joules_per_image"] = on_gpu.pop("joules") / images
    return {
        "images_per_s": images / elapsed_s,
        "step_ms": 1e3 * elapsed_s / count,
        "data_wait_percent": rates.data_wait_percent,
        "cpu_ms_per_image": 1e3 * used_s / images,
        "steps": count,
        **memory,
        **on_gpu,
    }


def held(device: torch.device) -> Reading:
    """Memory in use once all that is merely kept for reuse was given back; peaks start anew."""
    gc.collect()
    with suppress(OSError):  # some sandboxes refuse; the peak is then that of the whole run so far
        reset_peak_resident()
    found = {"host_bytes": float(memory_bytes())}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        found["reserved_bytes"] = float(torch.cuda.memory_reserved(device))
        if (nvml := nvml_device(device)) is not None:
            found["nvml_bytes"] = float(nvml.used_bytes())
    return found


def _peak(before: Reading, nvml_used_bytes: float | None, device: torch.device) -> Reading:
    """Growth since `before`, at its most. Of the other processes the peak is not known: they count as they are now."""
    now = {"host_bytes": float(memory_bytes() + peak_resident_bytes() - resident_bytes())}
    if device.type == "cuda":
        now["reserved_bytes"] = float(torch.cuda.max_memory_reserved(device))
        if nvml_used_bytes is not None:
            now["nvml_bytes"] = nvml_used_bytes
    return growth(before, now)


def growth(before: Reading, after: Reading) -> Reading:
    """Never below zero, where others' garbage was collected in the meantime."""
    return {key: max(0.0, after[key] - before[key]) for key in before if key in after}
