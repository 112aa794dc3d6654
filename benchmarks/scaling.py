"""Scaling of time and memory: of the step with batch, queue, side of the views and ranks, of the loaders with workers.

    uv run python benchmarks/scaling.py --config cifar --out DIR
    uv run python benchmarks/scaling.py --config r50 --axis batch,queue,ranks --out DIR
    uv run python benchmarks/scaling.py --quick

One parameter changes along an axis; all others are the configuration's. Steps are ours and the plain one, on synthetic
views; loaders are all that have workers, without a step; ranks run our step with real communication and the
configuration's batch on each (see benchmarks/measure/rank_scaling.py). All points of an axis are interleaved, and
`vs first` is the ratio to the same case's first point in the same round: of milliseconds per step, and for workers and
ranks of images/s. Memory is what a case adds while it runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from rich.console import Console

from benchmarks.measure.end_to_end import Case, Images, measure, open_case, start_fork_server
from benchmarks.measure.harness import (
    Reading,
    environment,
    parse_names,
    ratios,
    run_script,
    summarise_all,
    values_of,
)
from benchmarks.measure.plain import Task
from benchmarks.measure.rank_scaling import HALF_GRADIENTS, Ranks, add_efficiency, rank_counts
from benchmarks.measure.sample_data import open_index
from benchmarks.measure.turns import attempt, describe, interleave, reason, save
from benchmarks.measure.variants import CONFIGS, VARIANTS, Runner, Variant, shrunk
from benchmarks.reporting.page import make_console, print_blocks
from benchmarks.reporting.sections import section
from fastmoco.config import Arch
from fastmoco.device import DTYPES, pick_amp, pick_device
from fastmoco.errors import ConfigError
from pipelines.backends.select import PIPELINES
from pipelines.backends.select import default_workers as cores
from pipelines.workers import start_server

LOADERS = tuple(name for name in PIPELINES if name != "resident")  # which uses no workers once it is loaded
STEP_VARIANTS = {"ours": {"cuda": "graph", "cpu": "kept-memory"}, "plain": {"cuda": "plain", "cpu": "plain"}}
FACTORS = {"batch": (0.25, 0.5, 1, 2), "queue": (0.25, 1, 4, 16), "size": (0.5, 0.75, 1, 1.5)}
CPU_BATCH = 64
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Scaling of time and memory with batch, queue, size of the views, workers and ranks."""

    axis: str = "batch,queue,size,workers,ranks"
    """Names of axes, separated by commas."""
    config: Literal["cifar", "r50"] = "cifar"
    """ResNet-18 at 32 px, or ResNet-50 at 224 px: the start of every axis."""
    arch: Arch | None = None
    """Another ResNet than the configuration's."""
    batch_size: int | None = None
    """Another batch at the start of every axis."""
    data: str | None = None
    """For workers: a folder, list, .beton file or named data set. Unset: generated JPEGs."""
    limit: int | None = None
    """Maximum number of images."""
    pipelines: str = ",".join(LOADERS)
    """For workers: names of pipelines, separated by commas."""
    seconds: float = 2.0
    """Duration of a reading, in whole steps."""
    repetitions: int = 3
    """Number of interleaved rounds."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """A tiny task and two points per axis, to check that everything works."""
    out: Path | None = None
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Axis:
    """Readings along one axis by (case, point), and the reasons why cases were left out.

    grows  the quantity whose growth is reported
    write  called after every round
    """

    label: str
    grows: str
    write: Callable[[Axis, int], None]
    readings: dict[tuple[str, int], list[Reading]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def attempt(self, build: Callable[[], T], case: str, point: int) -> T | None:
        """What `build` returns, or None if it fails."""
        return attempt(build, _label((case, point)), self.left_out)

    def measure(self, runs: Mapping[tuple[str, int], Callable[[], Reading]], repetitions: int) -> None:
        """Measure all cases at all points in turns. Raises ConfigError if none of them runs."""

        def after_round(readings: dict[tuple[str, int], list[Reading]], rounds: int) -> None:
            self.readings.clear()
            self.readings.update(readings)
            self.write(self, rounds)

        if not runs:
            raise ConfigError(f"nothing runs along the axis of {self.label}: {describe(self.left_out)}")
        interleave(runs, repetitions, left_out=self.left_out, label=_label, after_round=after_round)


def _label(key: tuple[str, int]) -> str:
    return f"{key[0]} at {key[1]:,}"


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table per axis, write the result and return it. Raises ConfigError and DataError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, seconds=0.1, repetitions=2)
    names = parse_names(settings.axis, tuple(AXES), "--axis")
    device = pick_device(settings.device)
    task = _task(settings, device)
    torch.backends.cudnn.benchmark = True  # for all cases, as in the trainer and the authors' script
    if "workers" in names:
        start_server()  # imports torch in the background
    result: dict[str, Any] = {
        "benchmark": f"scaling-{settings.config}",
        "environment": environment(device),
        "settings": asdict(settings) | {"out": None},
        "task": asdict(task),
        "dtype": str(_dtype(device)),
        "axes": {},
    }
    result["left_out"] = {}
    path = None if settings.out is None else settings.out / f"scaling-{settings.config}.json"
    for name in names:

        def write(axis: Axis, rounds: int, name: str = name) -> None:
            result["axes"][name] = _summaries(axis)
            save(path, result, rounds, settings.repetitions, complete=name == names[-1])

        try:
            AXES[name](task, settings, device, write)
        except Exception as error:
            if len(names) == 1:
                raise
            result["left_out"][name] = reason(error)
            continue
        print_blocks(console, section(result | {"axes": {name: result["axes"][name]}, "complete": True}))
    if not result["axes"]:
        raise ConfigError(f"nothing could be measured: {describe(result['left_out'])}")
    save(path, result, settings.repetitions, settings.repetitions)
    return result


def _task(settings: Settings, device: torch.device) -> Task:
    """The task at the start of every axis."""
    task = CONFIGS[settings.config]
    if device.type == "cpu":
        task = replace(task, batch_size=min(CPU_BATCH, task.batch_size))
    if settings.quick:
        task = shrunk(task)
    task = replace(task, arch=settings.arch or task.arch, batch_size=settings.batch_size or task.batch_size)
    if task.batch_size % 8 or task.queue % (8 * task.batch_size):
        raise ConfigError(
            f"--batch-size {task.batch_size} cannot be halved and doubled along an axis: expected a multiple of 8 "
            f"whose 8-fold divides the queue of {task.queue:,} keys, such as {CPU_BATCH}"
        )
    smallest = min(_points("batch", task.batch_size, settings))
    splits = max(n for n in (1, 2, 4, 8) if n <= task.bn_splits and smallest >= 2 * n)
    return replace(task, bn_splits=splits)  # the same at every point


def _dtype(device: torch.device) -> torch.dtype:
    return DTYPES[pick_amp("auto", device)]


def _points(axis: str, start: int, settings: Settings) -> list[int]:
    factors = (0.5, 1) if settings.quick else FACTORS[axis]
    return [int(start * factor) for factor in factors]


def _batch(task: Task, settings: Settings, device: torch.device, write: Write) -> None:
    tasks = {batch: replace(task, batch_size=batch) for batch in _points("batch", task.batch_size, settings)}
    _steps(Axis("images per step", "step_ms", write), tasks, settings, device)


def _queue(task: Task, settings: Settings, device: torch.device, write: Write) -> None:
    tasks = {queue: replace(task, queue=queue) for queue in _points("queue", task.queue, settings)}
    _steps(Axis("keys in the queue", "step_ms", write), tasks, settings, device)


def _size(task: Task, settings: Settings, device: torch.device, write: Write) -> None:
    tasks = {side: replace(task, side=side) for side in _points("size", task.side, settings)}
    _steps(Axis("side of a view in pixels", "step_ms", write), tasks, settings, device)


def _steps(axis: Axis, tasks: dict[int, Task], settings: Settings, device: torch.device) -> None:
    """Both steps at every point, all of them built before the first reading."""
    variants = {variant.name: variant for variant in VARIANTS}
    runs: dict[tuple[str, int], Callable[[], Reading]] = {}
    for name, by_device in STEP_VARIANTS.items():
        for point, task in tasks.items():

            def build(variant: Variant = variants[by_device[device.type]], task: Task = task) -> Runner:
                return Runner(variant, task, device, _dtype(device), "off", settings.seconds)

            if (runner := axis.attempt(build, name, point)) is not None:
                runs[name, point] = partial(_step_reading, runner)
    axis.measure(runs, settings.repetitions)


def _step_reading(runner: Runner) -> Reading:
    reading = runner()
    return {"step_ms": reading["ms"], "images_per_s": reading["images_per_s"], **runner.memory}


def _workers(task: Task, settings: Settings, device: torch.device, write: Write) -> None:
    """Every loader with one worker, two, four, up to one per core."""
    names = [name.strip() for name in settings.pipelines.split(",") if name.strip()]
    for name in names:
        if name not in LOADERS:
            raise ConfigError(f"--pipelines {name} has no workers or is unknown: expected some of {','.join(LOADERS)}")
    max_workers = 2 if settings.quick else max(4, cores())
    points = sorted({2**n for n in range(max_workers.bit_length())} | {max_workers})
    axis, cases = Axis("workers", "images_per_s", write), dict[tuple[str, int], Case]()
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
        index = open_index(settings.data, task.side, settings.limit, Path(scratch), task.batch_size)
        images = Images(index, Path(scratch), cores())
        start_fork_server(device)
        try:
            for name in names:
                for workers in points:

                    def opened(name: str = name, workers: int = workers) -> Case:
                        return open_case(name, images, task, device, _dtype(device), workers, None)

                    if (case := attempt(opened, name, axis.left_out)) is None:
                        break
                    cases[name, workers] = case
            runs = {key: lambda case=case: measure(case, settings.seconds, device) for key, case in cases.items()}
            axis.measure(runs, settings.repetitions)
        finally:
            for case in cases.values():
                case.close()


def _ranks(task: Task, settings: Settings, device: torch.device, write: Write) -> None:
    """Our step with gradients sent in float32 and in bfloat16, on one rank and on several."""
    axis, runs = Axis("ranks", "images_per_s", write), dict[tuple[str, int], Callable[[], Reading]]()
    torch.cuda.empty_cache()  # memory of earlier axes; the ranks are separate processes
    with ExitStack() as open_ranks:
        for count in rank_counts(device):

            def start(count: int = count) -> Ranks:
                return Ranks(count, task, _dtype(device), device.type, seconds=settings.seconds)

            if (ranks := attempt(start, f"{count} ranks", axis.left_out)) is None:
                break
            open_ranks.enter_context(ranks)
            runs |= {(case, count): partial(ranks.read, case) for case in HALF_GRADIENTS}
        axis.measure(runs, settings.repetitions)


Write = Callable[[Axis, int], None]
AXES: dict[str, Callable[[Task, Settings, torch.device, Write], None]] = {
    "batch": _batch,
    "queue": _queue,
    "size": _size,
    "workers": _workers,
    "ranks": _ranks,
}


def _summaries(axis: Axis) -> dict[str, Any]:
    """One row per case and point. The first point of a case is the smallest one that could be measured."""
    rows, first = [], dict[str, list[float]]()
    if axis.label == "ranks":
        add_efficiency(axis.readings)
    for (case, point), readings in axis.readings.items():
        grows = values_of(readings, axis.grows)
        ratio = ratios(grows, first.setdefault(case, grows))
        rows.append({"case": case, "point": point, **summarise_all(readings), "ratio_to_first": ratio})
    return {"label": axis.label, "grows": axis.grows, "rows": rows, "left_out": axis.left_out}


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
