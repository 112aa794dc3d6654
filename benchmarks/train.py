"""End to end, from image files to updated weights: images/s, resources, and how much the loader slows down the step.

    uv run python benchmarks/train.py --config cifar --data cifar10 --out DIR
    uv run python benchmarks/train.py --config r50 --data imagenette --out DIR
    uv run python benchmarks/train.py --quick

images/s are data set images, two views each. Every pipeline feeds the step that the trainer builds on this machine,
without kNN and checkpoints. `plain` is what most people run: a plain DataLoader with a plain eager float32 step
(`benchmarks/measure/plain.py`); `dataloader` is the same loader with our step. The share of the step alone is the rate
over that of the same step on synthetic views in the same round: at 100 % the loader costs nothing. Cases are
interleaved, each with a new iterator, whose first batches are not counted. Files that fit in memory are read from the
page cache, not from the disk.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.measure.end_to_end import PLAIN, Case, Images, measure, open_case, start_fork_server, step_only
from benchmarks.measure.engines import Engine, our_engine, plain_engine, resolve_task
from benchmarks.measure.harness import (
    Reading,
    Summary,
    environment,
    parse_names,
    ratios,
    run_script,
    summarise_all,
    values_of,
)
from benchmarks.measure.plain import Task
from benchmarks.measure.sample_data import describe_data, open_index
from benchmarks.measure.turns import attempt, describe, interleave, save
from benchmarks.measure.variants import CONFIGS, shrunk
from benchmarks.reporting.page import make_console, print_blocks
from benchmarks.reporting.sections import section
from fastmoco.config import Arch, ResolvedConfig
from fastmoco.device import DTYPES, pick_device
from fastmoco.errors import ConfigError
from pipelines.backends.select import PIPELINES, default_workers

STEP, PLAIN_STEP = "step only", "plain step only"
STEP_BOUND = 0.95  # share of the step's own rate; below it the loader is the bottleneck


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Images/s end to end from files, with every input pipeline, compared with what most people run."""

    config: Literal["cifar", "r50"] = "cifar"
    """ResNet-18 at 32 px with batches of 512, or ResNet-50 at 224 px with batches of 256."""
    data: str | None = None
    """A folder, list, .beton file or named data set. Unset: generated JPEGs."""
    limit: int | None = None
    """Maximum number of images."""
    batch_size: int | None = None
    """Another number of images per step."""
    arch: Arch | None = None
    """Another ResNet than the configuration's."""
    width: float = 1.0
    """Factor on its channels, for small machines. The plain step exists only for width 1."""
    workers: int = default_workers()
    """Processes or threads of every pipeline."""
    pipelines: str = ",".join((*PIPELINES, PLAIN))
    """Names of pipelines, separated by commas."""
    seconds: float = 5.0
    """Duration of a reading, without warm-up."""
    repetitions: int = 5
    """Number of interleaved rounds."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """A tiny task and short readings, to check that everything works."""
    out: Path | None = None
    """Folder for the JSON file."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table, write the result and return it. Raises ConfigError and DataError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, seconds=0.2, repetitions=2)
    names = parse_names(settings.pipelines, (*PIPELINES, PLAIN), "--pipelines")
    task, device = _task(settings), pick_device(settings.device)
    torch.backends.cudnn.benchmark = True  # for all cases, as in the trainer and the authors' script
    result: dict[str, Any] = {"benchmark": f"train-{settings.config}", "environment": environment(device)}
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
        index = open_index(settings.data, task.side, settings.limit, Path(scratch), task.batch_size)
        data = settings.data or index.name
        config = resolve_task(task, index, device, workers=settings.workers, data=data, width=settings.width)
        run = config.run
        result |= {
            "settings": asdict(settings) | {"out": None},
            "task": asdict(task) | {"width": settings.width},
            "step": {"amp": run.amp, "kernels": run.kernels, "compile": run.compile, "cuda_graph": run.cuda_graph},
            "data": describe_data(index),
            "left_out": {},
        }
        images = Images(index, Path(scratch), settings.workers)
        if settings.workers:
            start_fork_server(device)
        path = None if settings.out is None else settings.out / f"train-{settings.config}.json"
        cases = _open_all(names, images, config, task, settings, device, result["left_out"])

        def write(readings: dict[str, list[Reading]], rounds: int) -> None:
            result.update(_summaries(readings, cases))
            save(path, result, rounds, settings.repetitions)

        try:
            runs = {name: lambda case=case: measure(case, settings.seconds, device) for name, case in cases.items()}
            interleave(runs, settings.repetitions, left_out=result["left_out"], after_round=write)
        finally:
            for case in cases.values():
                case.close()
    print_blocks(console, section(result))
    return result


def _task(settings: Settings) -> Task:
    """The task of a step. The plain step requires a queue that is a multiple of the batch."""
    task = CONFIGS[settings.config]
    if settings.quick:
        task = shrunk(task)
    task = replace(task, arch=settings.arch or task.arch, batch_size=settings.batch_size or task.batch_size)
    return replace(task, queue=max(task.batch_size, task.queue - task.queue % task.batch_size))


def _open_all(
    names: list[str],
    images: Images,
    config: ResolvedConfig,
    task: Task,
    settings: Settings,
    device: torch.device,
    left_out: dict[str, str],
) -> dict[str, Case]:
    """The steps alone and the pipelines that run here; the reasons why others do not go into `left_out`."""
    engines: dict[str, Engine | None] = {}
    if any(name != PLAIN for name in names):
        engines[STEP] = attempt(lambda: our_engine(config, task, images.index, device), STEP, left_out)
    if PLAIN in names and settings.width != 1.0:
        left_out[PLAIN] = "torchvision's ResNets have one width: set --width to 1 to measure it"
    elif PLAIN in names:
        engines[PLAIN_STEP] = attempt(lambda: plain_engine(task, device), PLAIN_STEP, left_out)
    cases = {name: step_only(engine, task) for name, engine in engines.items() if engine is not None}
    dtype = DTYPES[config.run.amp]
    for name in names:
        step = PLAIN_STEP if name == PLAIN else STEP
        engine = engines.get(step)
        if engine is None:
            left_out.setdefault(name, f"its step does not run: {left_out.get(step)}")
            continue

        def opened(name: str = name, engine: Engine = engine) -> Case:
            return open_case(name, images, task, device, dtype, settings.workers, engine)

        if (case := attempt(opened, name, left_out)) is not None:
            cases[name] = case
    if not any(name in cases for name in names):
        raise ConfigError(f"no pipeline runs here: {describe(left_out)}")
    return cases


def _summaries(readings: dict[str, list[Reading]], cases: dict[str, Case]) -> dict[str, Any]:
    """`step_only` and `cases` by name: summaries of all readings, and ratios within each round."""
    rates = {name: values_of(of_case) for name, of_case in readings.items()}
    described: dict[str, dict[str, Any]] = {"step_only": {}, "cases": {}}
    for name, of_case in readings.items():
        case, engine = summarise_all(of_case), cases[name].engine
        assert engine is not None
        if name in (STEP, PLAIN_STEP):
            described["step_only"]["plain" if name == PLAIN_STEP else "ours"] = case | {"warm_up_s": engine.warm_up_s}
            continue
        alone = rates.get(PLAIN_STEP if name == PLAIN else STEP)
        share = None if alone is None else ratios(rates[name], alone)
        described["cases"][name] = (
            case
            | ({} if share is None else {"share_of_step_only": share, "bottleneck": _bottleneck(share)})
            | {
                "ratio_to_plain": ratios(rates[name], rates[PLAIN]) if PLAIN in rates else None,
                "open_s": cases[name].open_s,
            }
        )
    return described


def _bottleneck(share: Summary) -> str:
    return "step" if share.median >= STEP_BOUND else "input"


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
