"""Writes the output of a run: configuration, status, metrics, checkpoints, pictures and console messages."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from fastmoco.config import ResolvedConfig
from fastmoco.console import StepMetrics, emit, say, show_result, shown_path
from fastmoco.errors import CheckpointError, DivergedError, ExitCode, Preempted, exit_code
from fastmoco.run import checkpoint, data_record
from fastmoco.run.checkpoint_writer import CheckpointWriter
from fastmoco.run.data_record import DataRecord
from fastmoco.run.directory import RunDirectory
from fastmoco.run.loggers import open_loggers
from fastmoco.run.metrics import MetricsWriter, Record, read_metrics
from fastmoco.run.overwrite import delete_temporary
from fastmoco.run.plots import curves, views_grid
from fastmoco.run.report import end_facts, evaluation_line
from fastmoco.run.sealed import sealed_bytes
from fastmoco.run.start_record import FILE_NAME as START_NAME
from fastmoco.run.start_record import StartRecord
from fastmoco.run.state import TrainState
from fastmoco.run.verdict import Verdict, judge_run, last_verdict, signs_of, verdict_line
from pipelines.augment.presets import Augmentation
from pipelines.data.index import ImageIndex
from pipelines.data.quarantine import FILE_NAME as LEDGER_NAME
from pipelines.data.quarantine import REPLACED, Ledger
from pipelines.files import write_atomically
from pipelines.views import Views

SAVE_ATTEMPTS = 3  # consecutive failures to save a checkpoint that end the run


class RunRecorder:
    """Writes the files of a run and reports its progress, on rank 0 only."""

    def __init__(self, directory: RunDirectory, config: ResolvedConfig, console: Console) -> None:
        self.directory, self.config, self.console = directory, config, console
        self.metrics = MetricsWriter(directory.path, tensorboard=config.run.tensorboard)
        self._writer = CheckpointWriter(directory.checkpoints, config.run.keep_checkpoints)
        self._saving, self._saving_since, self._saved_at = (0, 0), -math.inf, -math.inf
        self.loggers = open_loggers(config, directory.path)
        self._failed_saves = self._num_replaced = 0
        self._warned_not_pinned = False
        self._records: list[Record] = []  # of the metrics so far
        self._verdict: Verdict | None = None
        self.start: StartRecord | None = None

    def close(self) -> None:
        """Wait for the save in progress and close all files. Errors are only printed: the run has ended by now."""
        for end in (self._writer.wait, self._writer.close, self.metrics.close):
            try:
                end()
            except (CheckpointError, DivergedError) as error:
                say(self.console, str(error), "yellow")
            except OSError as error:
                say(self.console, f"{error.filename} lacks its last lines ({error.strerror})", "yellow")
        ending = sys.exception()
        state = "done" if ending is None else "preempted" if isinstance(ending, Preempted) else "failed"
        self._warn(self.loggers.close(state))

    def _warn(self, lines: Sequence[str]) -> None:
        for line in lines:
            say(self.console, line, "yellow")

    # ---- start ----

    def begin(self, views: Views, images: ImageIndex, augmentation: Augmentation, step: int, epoch: int) -> None:
        """Start a new run: write its configuration and a picture of `views`, whose keys are in the queries' order.

        images      that the views are of, by `views.index`
        step, epoch  0, or those of the run that it goes on from
        """
        self.directory.write_config(self.config)
        self.status(step, epoch)
        self._write_start()
        emit(self.console, "start", run=str(self.directory.path), step=step, epoch=epoch)
        path = self.directory.views_png
        with self.directory.writing(path):
            originals = [images.read(i) for i in views.index.tolist()]
            views_grid(views.query, views.key, augmentation.mean, augmentation.std, path, originals=originals)
            self.metrics.picture(step, "views", path)
            self.loggers.picture("views", path)

    def _write_start(self) -> None:
        """Write what the run says at its start; a failure is only printed."""
        try:
            if self.start is not None:
                self.start.write(self.directory.path)
        except OSError as error:
            say(self.console, f"{START_NAME} cannot be written ({error.strerror or error})", "yellow")

    def images(self, record: DataRecord | None) -> None:
        """Write what the images contain, with which a resumed run compares them; a failure is only printed."""
        try:
            if record is not None:
                data_record.write(record, self.directory.path / data_record.FILE_NAME)
        except OSError as error:
            say(self.console, f"{data_record.FILE_NAME} cannot be written ({error.strerror or error})", "yellow")

    def find_checkpoint(self) -> str:
        """Path of the newest valid checkpoint; warns about newer ones. Raises CheckpointError if there is none."""
        return str(checkpoint_at(self.directory.path, lambda warning: say(self.console, warning, "yellow")))

    def resumed(self, path: Path, step: int, epoch: int, total_steps: int) -> None:
        """Continue a resumed run: delete leftovers of a killed process, and metrics after the checkpoint."""
        checkpoint.sweep(self.directory.checkpoints)
        with self.directory.writing(self.directory.path):
            delete_temporary(self.directory.path)
        with self.directory.writing(self.metrics.path):
            corrupt = self.metrics.truncate_after(step)
        if corrupt:
            lines = "1 line was damaged, and is" if corrupt == 1 else f"{corrupt:,} lines were damaged, and are"
            say(self.console, f"{self.metrics.path.name}: {lines} left out", "yellow")
        self.directory.write_config(self.config)  # some settings may change, such as --epochs
        self._records = read_metrics(self.metrics.path) if self.metrics.path.exists() else []
        self._verdict = last_verdict(self._records)
        self.status(step, epoch)
        self._write_start()
        emit(self.console, "start", run=str(self.directory.path), step=step, epoch=epoch, steps=total_steps)
        say(self.console, f"resumed at step {step:,} of {total_steps:,} from {path.name}")
        if step == total_steps:
            say(self.console, f"all {epoch:,} epochs are done: more --epochs go on from here")

    # ---- during training ----

    def status(self, step: int, epoch: int) -> None:
        """Record that the run is active; a full disk is only reported."""
        try:
            self.directory.write_status(step=step, epoch=epoch, verdict=self._verdict)
        except OSError as error:
            say(self.console, f"status.json cannot be written ({error.strerror or error})", "yellow")

    def log_step(self, step: int, epoch: int, metrics: StepMetrics, skipped_steps: int) -> None:
        values = {name: value for name, value in metrics._asdict().items() if value is not None}
        if skipped_steps:
            values["skipped_steps"] = skipped_steps
        self._write_metrics(step, epoch, values)
        emit(self.console, "step", step=step, epoch=epoch, **values)

    def evaluation(self, step: int, epoch: int, numbers: dict[str, float], chance_loss: float, images: int) -> None:
        """Record the results of an evaluation, which may be empty before training, and judge whether the run learns."""
        if numbers and step:
            model, batch = self.config.model, self.config.optim.batch_size
            queue = model.moco_k if model.mechanism == "queue" else None
            directions = min(model.moco_dim, images - 1)
            records = [*self._records, {"step": step, "epoch": epoch} | numbers]
            self._verdict = judge_run(
                signs_of(records, chance_loss, batch_size=batch, queue=queue, most_directions=directions)
            )
        verdict = self._verdict if numbers and step else None
        values = numbers | ({} if verdict is None else verdict._asdict())
        self._write_metrics(step, epoch, values)
        emit(self.console, "evaluation", step=step, epoch=epoch, **values)
        if numbers:
            when = f"epoch {epoch}" if step else "before training"
            say(self.console, evaluation_line(when, numbers, self.config.model.moco_dim))
        if verdict is not None:
            say(self.console, verdict_line(verdict), "bold")

    def has_evaluated(self, step: int) -> bool:
        """Whether the metrics have an evaluation of that step, rather than a signal having stopped it."""
        return any(record["step"] == step and "loss" not in record for record in self._records)

    def _write_metrics(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        self.directory.check_present()
        self._records.append({"step": step, "epoch": epoch} | values)
        warning = self.metrics.write(step, epoch, **values)
        self.loggers.log(step, {"epoch": epoch, **values})
        self._warn([*([warning] if warning else []), *self.loggers.warnings()])

    def replaced(self, ledger: Ledger | None) -> None:
        """Warn about images that turned bad and were replaced, whenever there are new ones."""
        entries = [] if ledger is None else ledger.entries()
        replaced = [entry for entry in entries if entry.fate == REPLACED]
        if len(replaced) > self._num_replaced:
            self._num_replaced = len(replaced)
            count = f"{len(replaced):,} {'image has' if len(replaced) == 1 else 'images have'}"
            say(
                self.console,
                f"{count} turned bad, replaced by grey (see {LEDGER_NAME}): {replaced[-1].reason}",
                "yellow",
            )

    def saved_s_ago(self) -> float:
        """Seconds since the newest checkpoint, or since the save in progress was started."""
        if not self._writer.is_writing:
            self.finish_saving()
        return time.monotonic() - (self._saving_since if self._writer.is_pending else self._saved_at)

    def save(self, state: TrainState, epoch: int, *, last_chance: bool) -> None:
        """Save a checkpoint of the state as it is now, in the background unless it is the `last_chance`.

        Raises CheckpointError if the save before it was the third in a row to fail, or if this one fails on the last
        chance; DivergedError if the state is not finite. Earlier checkpoints stay.
        """
        self.directory.check_present()
        self.finish_saving(attempts=math.inf if last_chance else SAVE_ATTEMPTS)
        self._saving, self._saving_since = (state.step, epoch), time.monotonic()
        self._writer.start(
            state.step, state.tensors(), state.meta(), lambda: self.status(*self._saving), last_chance=last_chance
        )
        reason = self._writer.buffers.not_pinned
        if reason and not self._warned_not_pinned:
            self._warned_not_pinned = True
            say(self.console, f"checkpoints block the GPU, since memory cannot be pinned ({reason})", "yellow")
        if last_chance:
            self.finish_saving(attempts=1)

    def finish_saving(self, *, attempts: float = SAVE_ATTEMPTS) -> None:
        """Wait for the save in progress. Raises CheckpointError once `attempts` saves in a row have failed."""
        if not self._writer.is_pending:
            return
        try:
            self._writer.wait()
            self._failed_saves, self._saved_at = 0, self._saving_since
        except CheckpointError as error:
            self._failed_saves += 1
            if self._failed_saves >= attempts:
                raise
            say(self.console, f"{error}; training continues and will retry", "yellow")
            self.status(*self._saving)

    # ---- end ----

    def finish(
        self, backbone: nn.Module, step: int, epoch: int, seconds: float, images_per_s: float | None, chance_loss: float
    ) -> None:
        """Write the backbone with torchvision's names and the curves, and print the summary. Raises CheckpointError."""
        self.finish_saving(attempts=1)
        with self.directory.writing(self.directory.backbone):
            write_atomically(self.directory.backbone, sealed_bytes(backbone.state_dict()))
        with self.directory.writing(self.metrics.path):
            self.metrics.flush()
        records = self._records
        with self.directory.writing(self.directory.curves_png):
            curves(records, self.directory.curves_png, chance_loss)
            self.metrics.picture(step, "curves", self.directory.curves_png)
            self.loggers.picture("curves", self.directory.curves_png)
        with self.directory.writing(self.directory.path / "status.json"):
            self.directory.write_status(step=step, epoch=epoch, exit_code=ExitCode.DONE, verdict=self._verdict)
        paths = (self.directory.views_png, self.directory.curves_png, self.directory.backbone)
        files = [shown_path(path) for path in paths]
        latest = {name: value for record in records for name, value in record.items()}
        show_result(
            self.console,
            "done",
            end_facts(records, seconds, images_per_s, files),
            run=str(self.directory.path),
            backbone=str(self.directory.backbone),
            seconds=seconds,
            metrics=latest,
        )
        run = shlex.quote(shown_path(self.directory.path))
        say(self.console, f"fastmoco report {run} shows all of it on one page")

    def failed(self, error: BaseException) -> None:
        write_failure(self.directory, error)


def checkpoint_at(path: Path, warn: Callable[[str], object] = lambda line: None) -> Path:
    """The newest valid checkpoint of a run, or the checkpoint at this path. Raises CheckpointError if there is none.

    warn  is told of newer ones that are damaged
    """
    if not path.is_dir():
        return path
    newest, warnings = checkpoint.newest(path / "checkpoints")
    for line in warnings:
        warn(line)
    if newest is None:
        raise CheckpointError(f"no checkpoint in {path / 'checkpoints'}: start again with --overwrite")
    return newest


def write_failure(directory: RunDirectory, error: BaseException) -> None:
    """Record in status.json why a run failed; if that cannot be written, it must not hide the error."""
    with suppress(OSError, CheckpointError):
        directory.write_failure(exit_code(error) or 1, str(error) or repr(error))
