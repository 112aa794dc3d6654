"""Context of a run: ranks, data, resolved settings and folder, the same on all ranks, and recording of failures."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastmoco.config import ResolvedConfig, RunConfig
from fastmoco.config.resume import run_of
from fastmoco.console import resume_command, say, show_facts
from fastmoco.device import make_deterministic
from fastmoco.distributed.launch import is_launched
from fastmoco.distributed.world import World
from fastmoco.errors import AlreadyReportedError, CheckpointError, ConfigError, exit_code
from fastmoco.model.init_weights import InitWeights
from fastmoco.progress import reported
from fastmoco.run.batch_memory import FILE_NAME as BATCH_MEMORY
from fastmoco.run.batch_memory import BatchMemory
from fastmoco.run.directory import RunDirectory, read_config
from fastmoco.run.folder_names import folder_of
from fastmoco.run.initial import ReadInit, initial
from fastmoco.run.loggers import check_installed
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.run.outside import check_outside
from fastmoco.run.preemption import StopFlag
from fastmoco.run.recorder import write_failure
from fastmoco.run.resolve import portable, resolve
from fastmoco.run.stuck_reads import ended_by_stuck_reads
from fastmoco.run.thread_count import threads_restored
from pipelines.data.dataset import MAX_BAD_FRACTION, Dataset, load_dataset
from pipelines.data.index import ImageIndex
from pipelines.data.notes import decoding_lines
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
    init       the weights of --init that a run starts from, on rank 0 only
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
    init: InitWeights | None = None

    def plan(self, steps: int, steps_per_epoch: int, chance_loss: float) -> None:
        """Say in status.json from now on how long the run is, and the loss at chance level."""
        if self.directory is not None:
            self.directory.plan.update(steps=steps, steps_per_epoch=steps_per_epoch, chance_loss=chance_loss)


FitBatch = Callable[[RunConfig, Callable[[RunConfig], ResolvedConfig], ImageIndex, World], BatchMemory]
"""(settings, their `resolve`, images, world) → the batch of --batch-size auto."""


@contextmanager
def run_context(
    config: RunConfig,
    console: Console,
    read_init: ReadInit | None = None,
    fit_batch: FitBatch | None = None,
    from_recipe: Collection[str] = (),
) -> Iterator[RunContext]:
    """Join the other ranks, load the data and open the folder; errors raised after that are recorded in status.json.

    read_init    (path, prefix, arch) → the weights of --init, on rank 0 only
    fit_batch    measures the batch of --batch-size auto, on rank 0 only
    from_recipe  as of `resolve`

    The first rank that fails raises its error, the others AlreadyReportedError.
    """
    check_installed(config)
    if config.run.deterministic:
        make_deterministic()
    else:
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
    opened: list[RunDirectory] = []
    with (
        StopFlag(launched=is_launched()) as stop,
        World.join(config.run.device, config.scale.dist_timeout) as world,
        ended_by_stuck_reads(lambda error: _report(error, opened, world)),
    ):
        stop.before_exit = lambda message, code: _ended(opened, message, code)
        try:
            context = _create_context(config, console, world, stop, opened, read_init, fit_batch, from_recipe)
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
    config: RunConfig,
    console: Console,
    world: World,
    stop: StopFlag,
    opened: list[RunDirectory],
    read_init: ReadInit | None,
    fit_batch: FitBatch | None,
    from_recipe: Collection[str],
) -> RunContext:
    """Create the context; on rank 0, append the open folder to `opened`."""
    if world.device.type == "cpu":
        keep_freed_memory()
    data = config.data
    with reported(console if world.is_main else Console(quiet=True), "reading headers") as progress:
        dataset = world.local_main_first(lambda: load_dataset(data.data, **data.loading(), progress=progress))
    if world.is_main:
        for line in decoding_lines(dataset):
            say(console, line, "yellow")

    config = portable(config, world.device)

    weights: list[InitWeights] = []

    def resolve_and_open() -> dict[str, Any]:
        """Resolve settings that depend on this rank's memory, and open the folder on its disk."""
        settings: dict[str, Any] = {}
        if config.model.init is not None and read_init is not None:
            init, settings = initial(config, read_init)
            weights.extend([] if init is None else [init])
        chosen, memory = config.replace(**settings), None
        if chosen.optim.batch_size == "auto":
            chosen, memory = _with_batch(chosen, dataset, world, console, fit_batch, from_recipe)
        resolved, reasons = _resolved(chosen, dataset, world, from_recipe)
        reasons |= {"batch_size": memory.reason} if memory is not None else {}
        for init in weights:
            reasons |= {"init": init.describe(resolved.model), "arch": "as in --init", "stem": "as in --init"}
        folder = folder_of(resolved)
        check_outside(folder, data.data)
        _check_source(resolved, folder)
        auto = [name for name, value in config.flat().items() if value in (None, "auto")]
        if world.rank_info.restarts and (folder / "config.json").is_file():
            resolved, auto = ResolvedConfig.of(_restarted(folder)), []
        opened.append(RunDirectory.open(folder, resume=resolved.run.resume, overwrite=resolved.run.overwrite))
        if memory is not None:
            opened[0].write_text(BATCH_MEMORY, memory.to_json())
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
        init=weights[0] if weights else None,
    )


def _with_batch(
    config: RunConfig,
    dataset: Dataset,
    world: World,
    console: Console,
    fit_batch: FitBatch | None,
    from_recipe: Collection[str],
) -> tuple[RunConfig, BatchMemory | None]:
    """The settings with the batch size of --batch-size auto, which a run that is resumed keeps, and its measurement."""
    for folder in (config.run.out if config.run.resume else None, config.run.resume_from):
        run = run_of(Path(folder).expanduser()) if folder else None
        if run is not None:
            return config.replace(batch_size=read_config(run).optim.batch_size), None
    assert fit_batch is not None, "only training has a batch to fit"
    memory = fit_batch(
        config, lambda settings: _resolved(settings, dataset, world, from_recipe)[0], dataset.train, world
    )
    show_facts(console, "memory of a step", memory.facts())
    return config.replace(batch_size=memory.batch), memory


def _check_source(config: ResolvedConfig, folder: Path) -> None:
    """Raise ConfigError if a new run would replace the one that it goes on from."""
    source = config.run.resume_from
    if source is None or config.run.resume:
        return
    run = run_of(Path(source).expanduser())
    if run is not None and os.path.realpath(run) == os.path.realpath(folder):
        raise ConfigError(
            f"--resume-from {source} is in {folder}, the folder of this run: use --resume to go on in it, or another "
            "--out"
        )


def _resolved(
    config: RunConfig, dataset: Dataset, world: World, from_recipe: Collection[str]
) -> tuple[ResolvedConfig, dict[str, str]]:
    """`resolve`, with what was not used as data in an error: there may be fewer images than expected."""
    try:
        return resolve(config, dataset.train, world.device, world.rank_info, from_recipe)
    except ConfigError as error:
        if not dataset.choices.not_used:
            raise
        not_used = "; ".join(f"{what}, {why}" for what, why in dataset.choices.not_used)
        raise ConfigError(f"{error} (not used: {not_used})") from error


def _report(error: DataError, opened: list[RunDirectory], world: World) -> None:
    for directory in opened:
        write_failure(directory, error)
    world.report_failure(error)


def _ended(opened: list[RunDirectory], message: str, code: int) -> None:
    """Record that a second signal ends the process now."""
    for directory in opened:
        with suppress(OSError, CheckpointError):
            how = f"resume from the last checkpoint with: {resume_command(directory.path)}"
            directory.write_failure(code, f"{message}: {how}")


def _restarted(folder: Path) -> RunConfig:
    """Settings after a restart by torchrun: those of the run, resumed from its last checkpoint if there is one."""
    resumable = any((folder / "checkpoints").glob("step-*.safetensors"))
    return read_config(folder).replace(resume=resumable, overwrite=not resumable)
