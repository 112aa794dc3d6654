"""End to end, from image files to updated weights: images/s, what they cost, and how much of it the loader takes.

    uv run python benchmarks/train.py --config cifar --data cifar10 --out benchmarks/results
    uv run python benchmarks/train.py --config r50 --data imagenette --out benchmarks/results
    uv run python benchmarks/train.py --quick

images/s are images of the data set, two views each. Every pipeline feeds the step that the trainer builds on this
machine; kNN and checkpoints are left out. `plain` is what most people run: a plain DataLoader with a plain eager
float32 step behind it (`benchmarks/measure/plain.py`); `dataloader` is the same loader with our step. The share of
step-only is the rate over that of the same step on synthetic views, taken in the same round: 100 % is a loader that
costs nothing. The cases take turns, each with a new iterator, whose first batches are not counted. Files that fit in
memory come from the page cache, not from the disk.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose pipelines.py hides the package

import tempfile
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.measure.end_to_end import (
    PLAIN,
    Case,
    Engine,
    Images,
    augmentation_name,
    measure,
    open_case,
    our_engine,
    plain_engine,
    start_fork_server,
    step_only,
)
from benchmarks.measure.harness import (
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
from benchmarks.measure.ladder import CONFIGS
from benchmarks.measure.plain import Task
from benchmarks.measure.sample_data import open_index, stored_bytes
from fastmoco.config import Arch, ResolvedConfig, RunConfig
from fastmoco.device import DTYPES, pick_device
from fastmoco.errors import ConfigError
from fastmoco.run.resolve import resolve
from pipelines.backends.select import PIPELINES, default_workers
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError, DataError

STEP, PLAIN_STEP = "step only", "plain step only"
ENOUGH = 0.95  # of the step's own rate: below, the loader is what to make faster


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Images/s end to end, from files, with every input pipeline, against what most people run."""

    config: Literal["cifar", "r50"] = "cifar"
    """ResNet-18 at 32 px with batches of 512, or ResNet-50 at 224 px with batches of 256."""
    data: str | None = None
    """A folder, list, .beton file or named data set. Unset: JPEGs drawn for the occasion."""
    limit: int | None = None
    """At most so many images of it."""
    batch_size: int | None = None
    """Another number of images a step."""
    arch: Arch | None = None
    """Another ResNet."""
    width: float = 1.0
    """Factor on its channels, for small machines; other widths than 1 have no plain step."""
    workers: int = default_workers()
    """Processes or threads of every pipeline."""
    pipelines: str = ",".join((*PIPELINES, PLAIN))
    """Which, separated by commas."""
    seconds: float = 5.0
    """How long each reading takes, without its warm-up."""
    repetitions: int = 5
    """Rounds in which every pipeline has its turn."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """A tiny task, short readings: whether it works, not how fast it is."""
    out: Path | None = None
    """Folder for the JSON file."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measures, prints a table and returns what it writes. Raises ConfigError, DataError and DivergedError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, seconds=0.2, repetitions=2)
    names = chosen(settings.pipelines, (*PIPELINES, PLAIN), "--pipelines")
    task, device = _task(settings), pick_device(settings.device)
    torch.backends.cudnn.benchmark = True  # for every case, as the trainer and the authors' script do
    result: dict[str, Any] = {"benchmark": f"train-{settings.config}", "environment": environment(device)}
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
        index = open_index(settings.data, task.side, settings.limit, Path(scratch))
        if len(index) < task.batch_size:
            raise ConfigError(f"--batch-size {task.batch_size} is more than the {len(index)} images: use fewer")
        config = _run_config(settings, task, index, device)
        run = config.run
        result |= {
            "settings": asdict(settings) | {"out": None},
            "task": asdict(task) | {"width": settings.width},
            "step": {"amp": run.amp, "kernels": run.kernels, "compile": run.compile, "cuda_graph": run.cuda_graph},
            "data": {"images": len(index), "stored_bytes": stored_bytes(index), "description": index.describe()},
            "left_out": {},
        }
        images = Images(index, Path(scratch), settings.workers)
        if settings.workers:
            start_fork_server(device)
        cases = _open_all(names, images, config, task, settings, device, result["left_out"])
        try:
            runs = {name: lambda case=case: measure(case, settings.seconds, device) for name, case in cases.items()}
            readings = take_turns(runs, settings.repetitions)
        finally:
            for case in cases.values():
                case.close()
    result |= _summaries(readings, cases)
    _show(console, result)
    if settings.out is not None:
        write_json(settings.out / f"train-{settings.config}.json", result)
    return result


def _task(settings: Settings) -> Task:
    """What a step computes; the queue is a multiple of the batch, which the plain step needs."""
    task = CONFIGS[settings.config]
    if settings.quick:
        task = replace(task, arch="resnet18", side=16 if settings.config == "cifar" else 96, batch_size=8, queue=64)
        task = replace(task, bn_splits=2)
    task = replace(task, arch=settings.arch or task.arch, batch_size=settings.batch_size or task.batch_size)
    return replace(task, queue=max(task.batch_size, task.queue - task.queue % task.batch_size))


def _run_config(settings: Settings, task: Task, index: ImageIndex, device: torch.device) -> ResolvedConfig:
    """The task as a run, with what the trainer chooses by itself on this device."""
    given = RunConfig().replace(
        data=settings.data or index.name,
        pipeline="torch",
        workers=settings.workers,
        aug=augmentation_name(task.side),
        crop_size=task.side,
        arch=task.arch,
        width=settings.width,
        stem=task.stem,
        moco_dim=task.dim,
        moco_k=task.queue,
        moco_m=task.ema_momentum,
        moco_t=task.temperature,
        bn_splits=task.bn_splits,
        batch_size=task.batch_size,
        lr=task.lr,
        wd=task.weight_decay,
        sgd_momentum=task.sgd_momentum,
        allow_large_queue=True,  # a queue's cost does not depend on what is in it
    )
    return resolve(given, index, device)[0]


def _open_all(
    names: list[str],
    images: Images,
    config: ResolvedConfig,
    task: Task,
    settings: Settings,
    device: torch.device,
    left_out: dict[str, str],
) -> dict[str, Case]:
    """Steps alone and pipelines that can run here; why the others cannot goes into `left_out`."""
    engines: dict[str, Engine] = {}
    if any(name != PLAIN for name in names):
        engines[STEP] = our_engine(config, task, images.index, device)
    if PLAIN in names:
        if settings.width != 1.0:
            left_out[PLAIN] = "torchvision's ResNets have one width: leave --width at 1 to measure it"
        else:
            try:
                engines[PLAIN_STEP] = plain_engine(task, device)
            except torch.OutOfMemoryError:
                left_out[PLAIN] = f"its step has too little memory on {device} for a batch of {task.batch_size}"
    cases = {name: step_only(engine, task) for name, engine in engines.items()}
    dtype = DTYPES[config.run.amp]
    for name in names:
        if name in left_out:
            continue
        engine = engines[PLAIN_STEP if name == PLAIN else STEP]
        try:
            cases[name] = open_case(name, images, task, device, dtype, settings.workers, engine)
        except (BackendMissingError, DataError) as error:
            left_out[name] = str(error)
    if not cases:
        raise ConfigError(f"no pipeline runs here: {'; '.join(left_out.values())}")
    return cases


def _summaries(readings: dict[str, list[dict[str, float]]], cases: dict[str, Case]) -> dict[str, Any]:
    """`step_only` and `cases` by name: medians of all that was read, and ratios round by round."""
    rates = {name: [reading["images_per_s"] for reading in taken] for name, taken in readings.items()}
    found: dict[str, dict[str, Any]] = {"step_only": {}, "cases": {}}
    for name, taken in readings.items():
        one: dict[str, Any] = {key: summarise([reading[key] for reading in taken]) for key in taken[0]}
        engine = cases[name].engine
        assert engine is not None
        if name in (STEP, PLAIN_STEP):
            found["step_only"]["plain" if name == PLAIN_STEP else "ours"] = one | {"warm_up_s": engine.warm_up_s}
            continue
        share = ratios(rates[name], rates[PLAIN_STEP if name == PLAIN else STEP])
        one["share_of_step_only"] = share
        one["ratio_to_plain"] = ratios(rates[name], rates[PLAIN]) if PLAIN in rates else None
        one["bottleneck"] = "step" if share.median >= ENOUGH else "input"
        found["cases"][name] = one | {"open_s": cases[name].open_s}
    return found


def _show(console: Console, result: dict[str, Any]) -> None:
    task, data, settings = result["task"], result["data"], result["settings"]
    optional = {  # where there is a GPU, and as far as it answers
        "nvml_bytes": ("GPU MB", 1e-6),
        "gpu_utilisation_percent": ("GPU busy %", 1),
        "power_w": ("W", 1),
        "joules_per_image": ("J/image", 1),
    }
    everything = {STEP: result["step_only"].get("ours"), PLAIN_STEP: result["step_only"].get("plain")}
    everything = {name: one for name, one in everything.items() if one is not None} | result["cases"]
    present = [key for key in optional if all(key in one for one in everything.values())]
    rows = []
    for name, one in everything.items():
        alone = name in (STEP, PLAIN_STEP)
        ratio = one.get("ratio_to_plain")
        rows.append(
            (
                name,
                str(one["images_per_s"]),
                "–" if ratio is None else f"{ratio.median:.2f}×",
                "–" if alone else f"{one['share_of_step_only'].median:.1%}",
                "–" if alone else short(one["data_wait_percent"].median),
                short(one["cpu_ms_per_image"].median),
                short(one["host_bytes"].median / 1e6),
                *(short(one[key].median * optional[key][1]) for key in present),
                one.get("bottleneck", "–"),
            )
        )
    columns = ("pipeline", "images/s", "to plain", "of step only", "data wait %", "CPU ms/image", "host MB")
    columns = (*columns, *(optional[key][0] for key in present), "bottleneck")
    rows += [(name, "not measured", *[""] * (len(columns) - 2)) for name in result["left_out"]]
    note = f"{data['description']}, {data['stored_bytes'] / 1e6:,.0f} MB as stored"
    if data["stored_bytes"] / 2**30 < result["environment"]["memory_gib"] / 2:
        note += ", read from the page cache"
    note += "; our step: " + ", ".join(f"{name} {value}" for name, value in result["step"].items())
    note += "".join(f"\n{name}: {reason}" for name, reason in result["left_out"].items())
    width = "" if task["width"] == 1 else f" of width {task['width']:g}"
    sizes = f"{task['arch']}{width}, {task['side']} px, batch {task['batch_size']}, {settings['workers']} workers"
    show(console, f"end to end from files, {sizes}", columns, rows, note)


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
