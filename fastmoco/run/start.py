"""Context of a run: ranks, data, resolved settings and folder, the same on all ranks, and recording of failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmoco.config import ResolvedConfig, RunConfig
from fastmoco.device import make_deterministic
from fastmoco.distributed.launch import is_launched
from fastmoco.distributed.world import World
from fastmoco.errors import AlreadyReportedError, exit_code
from fastmoco.run.directory import RunDirectory, default_run_name, read_config
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.run.preemption import StopFlag
from fastmoco.run.recorder import write_failure
from fastmoco.run.resolve import resolve
from fastmoco.run.stuck_reads import ended_by_stuck_reads
from fastmoco.run.thread_count import threads_restored
from pipelines.data.dataset import MAX_BAD_FRACTION, Dataset, load_dataset
from pipelines.data.quarantine import FILE_NAME as LEDGER_NAME
from pipelines.data.quarantine import Ledger
from pipelines.errors import DataError


@dataclass(frozen=True)
class RunContext:
    """Everything that a run needs before training.

    config     the same on all ranks
    reasons    for the values that were filled in, by field
    auto       fields of the configuration that were not given
    folder     of the run; `directory` is that folder opened for writing, on rank 0 only
    console    prints on rank 0 only
    """

    config: ResolvedConfig
    reasons: dict[str, str]
    auto: frozenset[str]
    dataset: Dataset
    world: World
    folder: Path
    directory: RunDirectory | None
    stop: StopFlag
    console: Console


@contextmanager
def run_context(config: RunConfig, console: Console) -> Iterator[RunContext]:
    """Join the other ranks, load the data and open the folder; errors raised after that are recorded in status.json.

    The first rank that fails raises its error, the others AlreadyReportedError.
    """
    if config.run.deterministic:
        make_deterministic()
    else:
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
    opened: list[RunDirectory] = []
    with (
        StopFlag(repeats=is_launched()) as stop,
        World.join(config.run.device, config.scale.dist_timeout) as world,
        ended_by_stuck_reads(lambda error: _report(error, opened, world)),
    ):
        try:
            context = _create_context(config, console, world, stop, opened)
            threads = context.config.run.cpu_threads if world.device.type == "cpu" else None
            with threads_restored(threads):
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


def _create_context(
    config: RunConfig, console: Console, world: World, stop: StopFlag, opened: list[RunDirectory]
) -> RunContext:
    """Create the context; on rank 0, append the open folder to `opened`."""
    if world.device.type == "cpu":
        keep_freed_memory()
    data = config.data
    dataset = world.local_main_first(
        lambda: load_dataset(data.data, data_root=data.data_root, limit=data.limit, bad_images=data.bad_images)
    )

    def resolve_and_open() -> dict[str, Any]:
        """Resolve settings that depend on this rank's memory, and open the folder on its disk."""
        resolved, reasons = resolve(config, dataset.train, world.device, world.rank_info)
        folder = Path(resolved.run.out) if resolved.run.out else Path("runs") / default_run_name(resolved)
        auto = [name for name, value in config.flat().items() if value in (None, "auto")]
        if world.rank_info.restarts and (folder / "config.json").is_file():
            resolved, auto = ResolvedConfig.of(_restarted(folder)), []
        opened.append(RunDirectory.open(folder, resume=resolved.run.resume, overwrite=resolved.run.overwrite))
        return {"config": resolved.to_json(), "reasons": reasons, "auto": auto, "folder": str(opened[0].path)}

    shared = world.on_main(resolve_and_open)
    folder = Path(shared["folder"])
    if data.bad_images == "quarantine":
        folder.mkdir(parents=True, exist_ok=True)  # on a machine that does not share rank 0's disk
        images = len(dataset.train) + (len(dataset.test) if dataset.test else 0) + len(dataset.quarantine)
        dataset = dataset.with_ledger(Ledger(str(folder / LEDGER_NAME), most=int(MAX_BAD_FRACTION * images)))
    return RunContext(
        config=ResolvedConfig.of(RunConfig.from_json(shared["config"])),
        reasons=shared["reasons"],
        auto=frozenset(shared["auto"]),
        dataset=dataset,
        world=world,
        folder=folder,
        directory=opened[0] if opened else None,
        stop=stop,
        console=console if world.is_main else Console(quiet=True),
    )


def _report(error: DataError, opened: list[RunDirectory], world: World) -> None:
    for directory in opened:
        write_failure(directory, error)
    world.report_failure(error)


def _restarted(folder: Path) -> RunConfig:
    """Settings after a restart by torchrun: those of the run, resumed from its last checkpoint if there is one."""
    resumable = any((folder / "checkpoints").glob("step-*.safetensors"))
    return read_config(folder).replace(resume=resumable, overwrite=not resumable)
