"""How cost grows: with batch, queue, side of the views and ranks for the step, with the workers for the loaders.

    uv run python benchmarks/scaling.py --config cifar --out benchmarks/results
    uv run python benchmarks/scaling.py --config r50 --axis batch,queue,ranks --out benchmarks/results
    uv run python benchmarks/scaling.py --quick

One thing changes along an axis, all else stays as in the configuration. Of the step, on synthetic views, ours is read
beside the plain one; of the loaders, all that have workers, with nothing behind them; of ranks, ours with the real
messages, the configuration's batch on each (benchmarks/measure/rank_scaling.py says what is compared and counted). All
points of an axis take turns, and `to first` is the ratio to the same case's first point in the same round: of
milliseconds a step, and for workers and ranks of images/s. Memory is what a case adds while it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose pipelines.py hides the package

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.measure.end_to_end import Case, Images, measure, open_case, start_fork_server
from benchmarks.measure.harness import (
    Reading,
    chosen,
    environment,
    make_console,
    ratios,
    run_script,
    short,
    show,
    summarise,
    take_turns,
    write_json,
)
from benchmarks.measure.ladder import CONFIGS, LADDER, Runner
from benchmarks.measure.plain import Task
from benchmarks.measure.rank_scaling import HALF_GRADIENTS, Ranks, add_efficiency, rank_counts
from benchmarks.measure.sample_data import open_index
from fastmoco.config import Arch
from fastmoco.device import DTYPES, pick_amp, pick_device
from fastmoco.errors import ConfigError
from pipelines.backends.select import PIPELINES
from pipelines.backends.select import default_workers as cores
from pipelines.errors import BackendMissingError, DataError
from pipelines.workers import start_server

LOADERS = tuple(name for name in PIPELINES if name != "resident")  # which has no workers once it is loaded
RUNGS = {"ours": {"cuda": "graph", "cpu": "kept-memory"}, "plain": {"cuda": "plain", "cpu": "plain"}}
FACTORS = {"batch": (0.25, 0.5, 1, 2), "queue": (0.25, 1, 4, 16), "size": (0.5, 0.75, 1, 1.5)}
CPU_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How time and memory grow with batch, queue, size of the views, workers, and ranks."""

    axis: str = "batch,queue,size,workers,ranks"
    """Which, separated by commas."""
    config: Literal["cifar", "r50"] = "cifar"
    """ResNet-18 at 32 px, or ResNet-50 at 224 px: where every axis starts from."""
    arch: Arch | None = None
    """Another ResNet."""
    batch_size: int | None = None
    """Another batch to start from."""
    data: str | None = None
    """For workers: a folder, list, .beton file or named data set. Unset: JPEGs drawn for the occasion."""
    limit: int | None = None
    """At most so many images of it."""
    pipelines: str = ",".join(LOADERS)
    """For workers: which pipelines, separated by commas."""
    seconds: float = 2.0
    """How long each reading takes, in whole steps."""
    repetitions: int = 3
    """Rounds in which every point has its turn."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """A tiny task, two points an axis: whether it works, not how fast it is."""
    out: Path | None = None
    """Folder for the JSON file."""


@dataclass(frozen=True)
class Axis:
    """What was read along one axis: readings by (case, point) in the order of the points, and who was left out.

    grows  the reading whose growth is of interest
    """

    label: str
    grows: str
    readings: dict[tuple[str, int], list[Reading]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measures, prints a table for every axis and returns what it writes. Raises ConfigError and DataError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, seconds=0.1, repetitions=2)
    names = chosen(settings.axis, tuple(AXES), "--axis")
    device = pick_device(settings.device)
    task = _task(settings, device)
    torch.backends.cudnn.benchmark = True  # for every case, as the trainer and the authors' script do
    if "workers" in names:
        start_server()  # which imports torch while the first axis is prepared
    result: dict[str, Any] = {
        "benchmark": f"scaling-{settings.config}",
        "environment": environment(device),
        "settings": asdict(settings) | {"out": None},
        "task": asdict(task),
        "dtype": str(_dtype(device)),
        "axes": {},
    }
    for name in names:
        result["axes"][name] = _summaries(AXES[name](task, settings, device))
        _show(console, name, result)
    if settings.out is not None:
        write_json(settings.out / f"scaling-{settings.config}.json", result)
    return result


def _task(settings: Settings, device: torch.device) -> Task:
    """Where every axis starts from."""
    task = CONFIGS[settings.config]
    if device.type == "cpu":
        task = replace(task, batch_size=min(CPU_BATCH, task.batch_size))
    if settings.quick:
        side = 16 if settings.config == "cifar" else 96
        task = replace(task, arch="resnet18", side=side, batch_size=8, queue=64, bn_splits=2)
    task = replace(task, arch=settings.arch or task.arch, batch_size=settings.batch_size or task.batch_size)
    if task.batch_size % 8 or task.queue % (8 * task.batch_size):
        raise ConfigError(
            f"--batch-size {task.batch_size} cannot be halved and doubled along an axis: expected a multiple of 8, "
            f"8 times which divides the queue of {task.queue:,} keys, such as {CPU_BATCH}"
        )
    smallest = min(_points("batch", task.batch_size, settings))
    splits = max(n for n in (1, 2, 4, 8) if n <= task.bn_splits and smallest >= 2 * n)
    return replace(task, bn_splits=splits)  # the same ones at every point


def _dtype(device: torch.device) -> torch.dtype:
    return DTYPES[pick_amp("auto", device)]


def _points(axis: str, start: int, settings: Settings) -> list[int]:
    factors = (0.5, 1) if settings.quick else FACTORS[axis]
    return [int(start * factor) for factor in factors]


def _batch(task: Task, settings: Settings, device: torch.device) -> Axis:
    tasks = {batch: replace(task, batch_size=batch) for batch in _points("batch", task.batch_size, settings)}
    return _steps("images a step", tasks, settings, device)


def _queue(task: Task, settings: Settings, device: torch.device) -> Axis:
    tasks = {queue: replace(task, queue=queue) for queue in _points("queue", task.queue, settings)}
    return _steps("keys in the queue", tasks, settings, device)


def _size(task: Task, settings: Settings, device: torch.device) -> Axis:
    tasks = {side: replace(task, side=side) for side in _points("size", task.side, settings)}
    return _steps("side of a view in pixels", tasks, settings, device)


def _steps(label: str, tasks: dict[int, Task], settings: Settings, device: torch.device) -> Axis:
    """Both steps at every point, all of them built before the first is read."""
    axis, climbers = Axis(label, "step_ms"), {}
    rungs = {rung.name: rung for rung in LADDER}
    for name, by_device in RUNGS.items():
        for point, task in tasks.items():
            rung = rungs[by_device[device.type]]
            try:
                climbers[name, point] = Runner(rung, task, device, _dtype(device), "off", settings.seconds)
            except torch.OutOfMemoryError:
                axis.left_out[f"{name} at {point:,}"] = f"too little memory on {device}"
    taken = _in_turns(climbers, settings.repetitions)
    for key, readings in taken.items():
        memory = climbers[key].memory
        axis.readings[key] = [{"step_ms": r["ms"], "images_per_s": r["images_per_s"], **memory} for r in readings]
    return axis


def _workers(task: Task, settings: Settings, device: torch.device) -> Axis:
    """Every loader with one worker, two, four, up to one a core."""
    names = [name.strip() for name in settings.pipelines.split(",") if name.strip()]
    for name in names:
        if name not in LOADERS:
            raise ConfigError(f"--pipelines {name} has no workers or is unknown: expected some of {','.join(LOADERS)}")
    most = 2 if settings.quick else max(4, cores())
    points = sorted({2**n for n in range(most.bit_length())} | {most})
    axis, cases = Axis("workers", "images_per_s"), dict[tuple[str, int], Case]()
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
        index = open_index(settings.data, task.side, settings.limit, Path(scratch))
        if len(index) < task.batch_size:
            raise ConfigError(f"--batch-size {task.batch_size} is more than the {len(index)} images: use fewer")
        images = Images(index, Path(scratch), cores())
        start_fork_server(device)
        try:
            for name in names:
                for workers in points:
                    try:
                        case = open_case(name, images, task, device, _dtype(device), workers, None)
                    except (BackendMissingError, DataError) as error:
                        axis.left_out[name] = str(error)
                        break
                    cases[name, workers] = case
            runs = {key: lambda case=case: measure(case, settings.seconds, device) for key, case in cases.items()}
            axis.readings.update(_in_turns(runs, settings.repetitions))
        finally:
            for case in cases.values():
                case.close()
    return axis


def _ranks(task: Task, settings: Settings, device: torch.device) -> Axis:
    """Our step with its gradients sent in float32 and in bfloat16, on one rank and on more of them."""
    axis, runs = Axis("ranks", "images_per_s"), dict[tuple[str, int], Callable[[], Reading]]()
    torch.cuda.empty_cache()  # of other axes: the ranks are processes of their own
    with ExitStack() as open_ranks:
        for count in rank_counts(device):
            try:
                ranks = Ranks(count, task, _dtype(device), device.type, seconds=settings.seconds)
            except torch.OutOfMemoryError:
                axis.left_out[f"{count} ranks"] = f"too little memory on {device}"
                break
            open_ranks.enter_context(ranks)
            runs |= {(case, count): partial(ranks.read, case) for case in HALF_GRADIENTS}
        axis.readings.update(_in_turns(runs, settings.repetitions))
    add_efficiency(axis.readings)
    return axis


AXES: dict[str, Callable[[Task, Settings, torch.device], Axis]] = {
    "batch": _batch,
    "queue": _queue,
    "size": _size,
    "workers": _workers,
    "ranks": _ranks,
}


def _in_turns(runs: Mapping[tuple[str, int], Callable[[], Reading]], repetitions: int) -> dict[Any, list[Reading]]:
    """`take_turns` of cases that are known by a name and a point."""
    taken = take_turns({f"{name} at {point}": run for (name, point), run in runs.items()}, repetitions)
    return dict(zip(runs, taken.values(), strict=True))


def _summaries(axis: Axis) -> dict[str, Any]:
    """One row a case and point. The first point of a case is the smallest one that could be measured."""
    rows, first = [], dict[str, list[float]]()
    for (case, point), readings in axis.readings.items():
        grows = [reading[axis.grows] for reading in readings]
        row: dict[str, Any] = {"case": case, "point": point}
        row |= {key: summarise([reading[key] for reading in readings]) for key in readings[0]}
        rows.append(row | {"ratio_to_first": ratios(grows, first.setdefault(case, grows))})
    return {"label": axis.label, "grows": axis.grows, "rows": rows, "left_out": axis.left_out}


def _show(console: Console, name: str, result: dict[str, Any]) -> None:
    task, axis = result["task"], result["axes"][name]
    memories = {  # the first that was read is shown
        "nvml_bytes": "GPU MB",
        "reserved_bytes": "GPU MB",
        "peak_resident_bytes": "peak MB",
        "host_bytes": "host MB",
    }
    memory = next((key for key in memories if all(key in row for row in axis["rows"])), None)
    rows, on_ranks = [], all("efficiency" in row for row in axis["rows"])
    for row in axis["rows"]:
        size = "–" if memory is None else short(row[memory].median / 1e6)
        last = (f"{row['efficiency'].median:.2f}", _sent(row)) if on_ranks else (size,)
        cells = (short(row["step_ms"].median), str(row["images_per_s"]), f"{row['ratio_to_first'].median:.2f}×")
        rows.append((row["case"], f"{row['point']:,}", *cells, *last))
    note = "\n".join(f"{case}: {reason}" for case, reason in axis["left_out"].items())
    last = ("efficiency", "MB sent (least)") if on_ranks else (memories.get(memory or "", "memory"),)
    columns = ("case", axis["label"], "ms a batch", "images/s", "to first", *last)
    rows += [(case, "not measured", *[""] * (len(columns) - 2)) for case in axis["left_out"]]
    sizes = f"{task['arch']}, {task['side']} px, batch {task['batch_size']}, queue {task['queue']:,}"
    show(console, f"scaling with {name}, from {sizes}, {task['bn_splits']} BN splits", columns, rows, note)


def _sent(row: dict[str, Any]) -> str:
    counted = f"{row['sent_bytes'].median / 1e6:.2f}" if "sent_bytes" in row else "not counted"
    return f"{counted} ({row['least_bytes'].median / 1e6:.2f})"


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
