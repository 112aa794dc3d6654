"""End to end from the same image files, compared with other trainers: lightly, and the authors' own code.

    uv sync --inexact --group bench
    uv run python benchmarks/compare_peers.py --config cifar --data cifar10 --out DIR
    uv run python benchmarks/compare_peers.py --config r50 --data imagenette --out DIR
    uv run python benchmarks/compare_peers.py --quick

images/s are data set images, two views each. All have the same images, encoder, batch, queue, temperature, optimiser
and augmentation. Every peer has two rows: with its default settings, and at its best, which is bfloat16 autocast if the
device supports it, channels-last, pinned memory and the fastest of three numbers of workers. In the peers' favour:
cuDNN benchmarks its algorithms in every row, their DataLoaders never reach the end of an epoch, lightly neither splits
its batch norm nor shuffles keys, and at 32 px the authors' code decodes its images before the measurement, like
`resident`. fastmoco runs as in `fastmoco train`, without evaluations and checkpoints.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.measure.archives import unpacked
from benchmarks.measure.end_to_end import Images, measure
from benchmarks.measure.engines import resolve_task
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
from benchmarks.measure.sample_data import describe_data, open_index
from benchmarks.measure.turns import attempt, describe, interleave, save
from benchmarks.measure.variants import CONFIGS, shrunk
from benchmarks.peers.contenders import OURS, PEERS, Row, open_ours, open_peer, start_fork_server
from benchmarks.peers.lightly import require_lightly
from benchmarks.reporting.page import make_console, print_blocks
from benchmarks.reporting.sections import section
from fastmoco.config import Arch
from fastmoco.device import pick_device
from fastmoco.errors import ConfigError
from pipelines.backends.select import default_workers
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Images/s of pretraining from files, compared with lightly and the authors' code, by default and at their best."""

    config: Literal["cifar", "r50"] = "cifar"
    """ResNet-18 at 32 px with batches of 512, or ResNet-50 at 224 px with batches of 256."""
    data: str | None = None
    """A folder, tar file, list, .beton file or named data set. Unset: generated JPEGs."""
    limit: int | None = None
    """Maximum number of images."""
    batch_size: int | None = None
    """Another number of images per step."""
    arch: Arch | None = None
    """Another ResNet than the configuration's."""
    symmetric: bool = False
    """Use every view as query and as key, an option of the demo."""
    workers: int = default_workers()
    """Processes of fastmoco's torch pipeline. At their best, peers use this number, half or twice as many."""
    rows: str = ",".join((*OURS, *PEERS))
    """Names of rows, separated by commas."""
    seconds: float = 5.0
    """Duration of a reading, without warm-up."""
    repetitions: int = 5
    """Number of interleaved rounds."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """A tiny task, one worker and short readings, to check that everything works."""
    out: Path | None = None
    """Folder for the JSON file."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table, write the result and return it. Raises ConfigError and DataError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, seconds=0.3, repetitions=2, workers=1)
    names = parse_names(settings.rows, (*OURS, *PEERS), "--rows")
    task, device = _task(settings), pick_device(settings.device)
    torch.backends.cudnn.benchmark = True  # for all rows, as in the authors' script
    result: dict[str, Any] = {"benchmark": f"peers-{settings.config}", "environment": environment(device)}
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
        index = open_index(unpacked(settings.data), task.side, settings.limit, Path(scratch), task.batch_size)
        result |= {
            "settings": asdict(settings) | {"out": None},
            "task": asdict(task),
            "data": describe_data(index),
            "left_out": {},
        }
        kind = settings.config + ("-symmetric" if settings.symmetric else "")
        path = None if settings.out is None else settings.out / f"peers-{kind}.json"
        rows = _open_all(names, index, Path(scratch), task, settings, device, result["left_out"])

        def write(readings: dict[str, list[Reading]], rounds: int) -> None:
            result["rows"], result["ratios"] = _summaries(readings, rows), _ratios(readings)
            save(path, result, rounds, settings.repetitions)

        try:
            runs = {name: lambda r=row: measure(r.case, settings.seconds, device) for name, row in rows.items()}
            interleave(runs, settings.repetitions, left_out=result["left_out"], after_round=write)
        finally:
            for row in rows.values():
                row.case.close()
    print_blocks(console, section(result))
    return result


def _task(settings: Settings) -> Task:
    """The task of a step. The authors' code requires a queue that is a multiple of the keys per step."""
    task = CONFIGS[settings.config]
    if settings.config == "cifar":
        task = replace(task, lr=0.06)
    if settings.quick:
        task = shrunk(task)
    task = replace(task, arch=settings.arch or task.arch, batch_size=settings.batch_size or task.batch_size)
    keys = task.batch_size * (2 if settings.symmetric else 1)
    return replace(task, queue=max(keys, task.queue - task.queue % keys))


def _open_all(
    names: list[str],
    index: ImageIndex,
    scratch: Path,
    task: Task,
    settings: Settings,
    device: torch.device,
    left_out: dict[str, str],
) -> dict[str, Row]:
    """The trainers that run here; the reasons why others do not go into `left_out`."""
    rows: dict[str, Row] = {}
    ours, peers = [name for name in names if name in OURS], [name for name in names if name in PEERS]
    try:
        require_lightly()
    except BackendMissingError as error:
        left_out |= {name: str(error) for name in peers if name.startswith("lightly")}
        peers = [name for name in peers if name not in left_out]
    if peers:
        start_fork_server(peers)
    try:
        if ours:
            config = resolve_task(task, index, device, workers=settings.workers, symmetric=settings.symmetric)
            images = Images(index, scratch, settings.workers)
            rows |= open_ours(ours, images, config, task, device, left_out)
        for name in peers:
            opened = attempt(lambda name=name: _open_peer(name, index, task, settings, device), name, left_out)
            if opened is not None:
                rows[name] = opened
        if not rows:
            raise ConfigError(f"nothing to measure: {describe(left_out)}")
    except BaseException:
        for row in rows.values():
            row.case.close()
        raise
    return rows


def _open_peer(name: str, index: ImageIndex, task: Task, settings: Settings, device: torch.device) -> Row:
    return open_peer(
        name,
        index,
        task,
        device,
        symmetric=settings.symmetric,
        workers=settings.workers,
        tuning_s=settings.seconds / 2,
        default_workers=not settings.quick,
    )


def _summaries(readings: dict[str, list[Reading]], rows: dict[str, Row]) -> dict[str, Any]:
    """Summaries of all readings by name, with the row's settings, its time to open and its tuning."""
    return {
        name: summarise_all(of_row)
        | {"terms": rows[name].terms, "open_s": rows[name].case.open_s, "tuning": rows[name].tuning}
        for name, of_row in readings.items()
    }


def _ratios(readings: dict[str, list[Reading]]) -> dict[str, Any]:
    """Ratios of our rate to each peer's within each round: `{"fastmoco-torch": {"lightly": ...}}`."""
    rates = {name: values_of(of_row) for name, of_row in readings.items()}
    return {
        ours: {peer: ratios(rates[ours], rates[peer]) for peer in PEERS if peer in rates}
        for ours in OURS
        if ours in rates
    }


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
