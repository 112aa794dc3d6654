"""How a run starts and how it ends: devices, data, settings and folder, agreed by all ranks; and what went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmoco.config import RunConfig
from fastmoco.device import make_deterministic
from fastmoco.distributed.launch import is_launched
from fastmoco.distributed.world import World
from fastmoco.errors import AlreadyReportedError, exit_code
from fastmoco.run.directory import RunDirectory, default_run_name, read_config
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.run.preemption import StopFlag
from fastmoco.run.recorder import write_failure
from fastmoco.run.resolve import resolve
from fastmoco.run.thread_count import threads_restored
from pipelines.data.dataset import MAX_BAD_FRACTION, Dataset, load_dataset
from pipelines.data.quarantine import FILE_NAME as LEDGER_NAME
from pipelines.data.quarantine import Ledger


@dataclass(frozen=True)
class RunContext:
    """What a run is made of.

    config     without open fields, the same on all ranks
    reasons    why, for what was filled in
    folder     of the run; `directory` is that folder opened for writing, on rank 0
    console    silent on the other ranks
    """

    config: RunConfig
    reasons: dict[str, str]
    dataset: Dataset
    world: World
    folder: Path
    directory: RunDirectory | None
    stop: StopFlag
    console: Console


@contextmanager
def run_context(config: RunConfig, console: Console) -> Iterator[RunContext]:
    """Joins the other ranks, loads the data and opens the folder; whatever is raised from then on is in status.json.

    Of the ranks that end, the first to know why raises that error, and the others AlreadyReportedError.
    """
    if config.run.deterministic:
        make_deterministic()
    else:
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
    opened: list[RunDirectory] = []
    with World.join(config.run.device, config.scale.dist_timeout) as world:
        try:
            context = _start(config, console, world, opened)
            threads = context.config.run.cpu_threads if world.device.type == "cpu" else None
            with threads_restored(threads), context.stop:
                yield context
        except BaseException as error:
            for directory in opened:
                write_failure(directory, error)
            code = exit_code(error)
            if not world.report_failure(error) and code is not None:
                raise AlreadyReportedError(code) from error
            raise
        finally:
            for directory in opened:
                directory.close()


def _start(config: RunConfig, console: Console, world: World, opened: list[RunDirectory]) -> RunContext:
    """`opened` receives the folder, on the rank that opens it."""
    if world.device.type == "cpu":
        keep_freed_memory()
    data = config.data
    dataset = world.first_on_each_machine(
        lambda: load_dataset(data.data, data_root=data.data_root, limit=data.limit, bad_images=data.bad_images)
    )

    def settle() -> dict[str, Any]:
        """What depends on one rank's memory and disk, and all must agree on."""
        settled, reasons = resolve(config, dataset.train, world.device, world.rank_info)
        folder = Path(settled.run.out) if settled.run.out else Path("runs") / default_run_name(settled)
        if world.rank_info.restarts and (folder / "config.json").is_file():
            settled = _restarted(folder)
        opened.append(RunDirectory.open(folder, resume=settled.run.resume, overwrite=settled.run.overwrite))
        return {"config": settled.to_json(), "reasons": reasons, "folder": str(opened[0].path)}

    settled = world.on_main(settle)
    folder = Path(settled["folder"])
    if data.bad_images == "quarantine":
        folder.mkdir(parents=True, exist_ok=True)  # on a machine that does not share rank 0's disk
        images = len(dataset.train) + (len(dataset.test) if dataset.test else 0) + len(dataset.quarantine)
        dataset = dataset.with_ledger(Ledger(str(folder / LEDGER_NAME), most=int(MAX_BAD_FRACTION * images)))
    return RunContext(
        config=RunConfig.from_json(settled["config"]),
        reasons=settled["reasons"],
        dataset=dataset,
        world=world,
        folder=folder,
        directory=opened[0] if opened else None,
        stop=StopFlag(repeats=is_launched()),
        console=console if world.is_main else Console(quiet=True),
    )


def _restarted(folder: Path) -> RunConfig:
    """The settings of a run that torchrun starts again: its own, to go on from the last checkpoint if there is one."""
    resumable = any((folder / "checkpoints").glob("step-*.safetensors"))
    return read_config(folder).replace(resume=resumable, overwrite=not resumable)
