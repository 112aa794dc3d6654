"""End to end from the same image files, beside what else people pretrain with: lightly, and the authors' own code.

    uv sync --group bench
    uv run python benchmarks/compare_peers.py --config cifar --data cifar10 --out benchmarks/results
    uv run python benchmarks/compare_peers.py --config r50 --data imagenette --out benchmarks/results
    uv run python benchmarks/compare_peers.py --quick

images/s are images of the data set, two views each. All have the same images, encoder, batch, queue, temperature,
optimiser and augmentation. Every peer has two rows: as its example or its authors run it, and at its best, which is
bfloat16 autocast where the device has it, channels-last, pinned memory and the fastest of three numbers of workers. In
the peers' favour: cuDNN may try its algorithms in every row, their DataLoaders never come to the end of an epoch,
lightly neither splits its batch norm nor shuffles keys, and at 32 px the authors' code has its images decoded before
the clock starts, as `resident` has. fastmoco is as `fastmoco train` runs it, without evaluations and checkpoints.
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

from benchmarks.measure.archives import unpacked
from benchmarks.measure.end_to_end import Images, augmentation_name, measure
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
from benchmarks.measure.ladder import CONFIGS
from benchmarks.measure.plain import Task
from benchmarks.measure.sample_data import open_index, stored_bytes
from benchmarks.peers.contenders import OURS, PEERS, Row, open_ours, open_peer, start_fork_server
from benchmarks.peers.lightly import require_lightly
from fastmoco.config import Arch, ResolvedConfig, RunConfig
from fastmoco.device import pick_device
from fastmoco.errors import ConfigError
from fastmoco.run.resolve import resolve
from pipelines.backends.select import default_workers
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Images/s of pretraining from files, beside lightly and the authors' code as they come and at their best."""

    config: Literal["cifar", "r50"] = "cifar"
    """ResNet-18 at 32 px with batches of 512, or ResNet-50 at 224 px with batches of 256."""
    data: str | None = None
    """A folder, tar file, list, .beton file or named data set. Unset: JPEGs drawn for the occasion."""
    limit: int | None = None
    """At most so many images of it."""
    batch_size: int | None = None
    """Another number of images a step."""
    arch: Arch | None = None
    """Another ResNet."""
    symmetric: bool = False
    """Every view once as query and once as key, as the demo has for an option."""
    workers: int = default_workers()
    """Processes of fastmoco's torch pipeline. The peers at their best have as many, half or twice as many."""
    rows: str = ",".join((*OURS, *PEERS))
    """Which, separated by commas."""
    seconds: float = 5.0
    """How long each reading takes, without its warm-up."""
    repetitions: int = 5
    """Rounds in which everyone has a turn."""
    device: str = "auto"
    """auto, cpu or cuda."""
    quick: bool = False
    """A tiny task, one worker, short readings: whether it works, not how fast it is."""
    out: Path | None = None
    """Folder for the JSON file."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measures, prints a table and returns what it writes. Raises ConfigError, DataError and DivergedError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, seconds=0.3, repetitions=2, workers=1)
    names = chosen(settings.rows, (*OURS, *PEERS), "--rows")
    task, device = _task(settings), pick_device(settings.device)
    torch.backends.cudnn.benchmark = True  # for every row, as the authors' script does
    result: dict[str, Any] = {"benchmark": f"peers-{settings.config}", "environment": environment(device)}
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch:
        index = open_index(unpacked(settings.data), task.side, settings.limit, Path(scratch))
        if len(index) < task.batch_size:
            raise ConfigError(f"--batch-size {task.batch_size} is more than the {len(index)} images: use fewer")
        result |= {
            "settings": asdict(settings) | {"out": None},
            "task": asdict(task),
            "data": {"images": len(index), "stored_bytes": stored_bytes(index), "description": index.describe()},
            "left_out": {},
        }
        rows = _open_all(names, index, Path(scratch), task, settings, device, result["left_out"])
        try:
            runs = {name: lambda r=row: measure(r.case, settings.seconds, device) for name, row in rows.items()}
            readings = take_turns(runs, settings.repetitions)
        finally:
            for row in rows.values():
                row.case.close()
    result["rows"] = _summaries(readings, rows)
    result["ratios"] = _ratios(readings)
    _show(console, result)
    if settings.out is not None:
        kind = settings.config + ("-symmetric" if settings.symmetric else "")
        write_json(settings.out / f"peers-{kind}.json", result)
    return result


def _task(settings: Settings) -> Task:
    """What a step computes; the queue is a multiple of the keys of a step, which the authors' code needs."""
    task = CONFIGS[settings.config]
    if settings.config == "cifar":
        task = replace(task, lr=0.06)
    if settings.quick:
        task = replace(task, arch="resnet18", side=16 if settings.config == "cifar" else 96, batch_size=8, queue=64)
        task = replace(task, bn_splits=2)
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
    """The contenders that can run here; why the others cannot goes into `left_out`."""
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
            config = _run_config(settings, task, index, device)
            rows |= open_ours(ours, Images(index, scratch, settings.workers), config, task, device)
        for name in peers:
            try:
                rows[name] = open_peer(
                    name,
                    index,
                    task,
                    device,
                    symmetric=settings.symmetric,
                    workers=settings.workers,
                    tuning_s=settings.seconds / 2,
                    its_default=not settings.quick,
                )
            except torch.OutOfMemoryError as error:
                left_out[name] = str(error).splitlines()[0]
        if not rows:
            raise ConfigError(f"nothing to measure: {'; '.join(left_out.values())}")
    except BaseException:
        for row in rows.values():
            row.case.close()
        raise
    return rows


def _run_config(settings: Settings, task: Task, index: ImageIndex, device: torch.device) -> ResolvedConfig:
    """The task as a run, with what the trainer chooses by itself on this device."""
    given = RunConfig().replace(
        data=index.name,
        pipeline="torch",
        workers=settings.workers,
        aug=augmentation_name(task.side),
        crop_size=task.side,
        arch=task.arch,
        stem=task.stem,
        moco_dim=task.dim,
        moco_k=task.queue,
        moco_m=task.ema_momentum,
        moco_t=task.temperature,
        bn_splits=task.bn_splits,
        symmetric=settings.symmetric,
        batch_size=task.batch_size,
        lr=task.lr,
        wd=task.weight_decay,
        sgd_momentum=task.sgd_momentum,
        allow_large_queue=True,  # a queue's cost does not depend on what is in it
    )
    return resolve(given, index, device)[0]


def _summaries(readings: dict[str, list[Reading]], rows: dict[str, Row]) -> dict[str, Any]:
    """By name: medians of all that was read, the terms, and what opening took."""
    found: dict[str, Any] = {}
    for name, taken in readings.items():
        found[name] = {key: summarise([reading[key] for reading in taken]) for key in taken[0]}
        found[name] |= {"terms": rows[name].terms, "open_s": rows[name].case.open_s, "tuning": rows[name].tuning}
    return found


def _ratios(readings: dict[str, list[Reading]]) -> dict[str, Any]:
    """Ours to each peer, round by round: `{"fastmoco-torch": {"lightly": ...}}`."""
    rates = {name: [reading["images_per_s"] for reading in taken] for name, taken in readings.items()}
    return {
        ours: {peer: ratios(rates[ours], rates[peer]) for peer in PEERS if peer in rates}
        for ours in OURS
        if ours in rates
    }


def _show(console: Console, result: dict[str, Any]) -> None:
    task, data, settings = result["task"], result["data"], result["settings"]
    on_gpu = all("nvml_bytes" in one for one in result["rows"].values())
    rows = []
    for name, one in result["rows"].items():
        rows.append(
            (
                name,
                one["terms"],
                str(one["images_per_s"]),
                *(f"{of[name].median:.2f}×" if name in of else "–" for of in result["ratios"].values()),
                short(one["data_wait_percent"].median),
                short(one["cpu_ms_per_image"].median),
                short(one["host_bytes"].median / 1e6),
                *([short(one["nvml_bytes"].median / 1e6)] if on_gpu else []),
                short(one["open_s"]),
            )
        )
    columns = ("", "with", "images/s", *(f"{ours.split('-')[1]} is" for ours in result["ratios"]), "data wait %")
    columns = (*columns, "CPU ms/image", "host MB", *(["GPU MB"] if on_gpu else []), "opening s")
    rows += [(name, "not measured", *[""] * (len(columns) - 2)) for name in result["left_out"]]
    note = f"{data['description']}, {data['stored_bytes'] / 1e6:,.0f} MB as stored"
    if data["stored_bytes"] / 2**30 < result["environment"]["memory_gib"] / 2:
        note += ", read from the page cache"
    note += "".join(f"\n{name}: {reason}" for name, reason in result["left_out"].items())
    twice = ", symmetric" if settings["symmetric"] else ""
    sizes = f"{task['arch']}, {task['side']} px, batch {task['batch_size']}, queue {task['queue']:,}{twice}"
    show(console, f"end to end from files, beside the peers, {sizes}", columns, rows, note)


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
