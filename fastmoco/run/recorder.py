"""What a run leaves behind and says: configuration, status, metrics, checkpoints, pictures and lines for people."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from fastmoco.config import RunConfig
from fastmoco.console import StepMetrics, say, show_facts
from fastmoco.errors import CheckpointError, ConfigError, ExitCode, exit_code
from fastmoco.files import temporary
from fastmoco.model.encoder import Backbone
from fastmoco.run import checkpoint
from fastmoco.run.directory import RunDirectory, read_status
from fastmoco.run.metrics import MetricsWriter, read_metrics
from fastmoco.run.plots import curves, views_grid
from fastmoco.run.report import end_facts, evaluation_line
from fastmoco.run.state import TrainState
from pipelines.augment.presets import Augmentation
from pipelines.data.quarantine import FILE_NAME as LEDGER_NAME
from pipelines.data.quarantine import REPLACED, Ledger
from pipelines.views import Views

SAVE_ATTEMPTS = 3  # checkpoints in a row that may fail before the run gives up


class RunRecorder:
    """The folder of a run and what is in it, in the hands of the one rank that writes."""

    def __init__(self, directory: RunDirectory, config: RunConfig, console: Console) -> None:
        self.directory, self.config, self.console = directory, config, console
        self.metrics = MetricsWriter(directory.path, tensorboard=config.run.tensorboard)
        self._saved_at = -math.inf
        self._failed_saves = self._replaced = 0

    def close(self) -> None:
        self.metrics.close()

    # ---- the start ----

    def begin(self, views: Views, augmentation: Augmentation) -> None:
        """A new run: its configuration, and a picture of these views, whose keys are in the order of the queries."""
        self.directory.write_config(self.config)
        self.status(0, 0)
        views_grid(views.query, views.key, augmentation.mean, augmentation.std, self.directory.views_png)

    def find_checkpoint(self) -> str:
        """The newest one that verifies; what is wrong with later ones is said. Raises CheckpointError without one."""
        path, warnings = checkpoint.newest(self.directory.checkpoints)
        for warning in warnings:
            say(self.console, warning, "yellow")
        if path is None:
            raise CheckpointError(f"no checkpoint in {self.directory.checkpoints}: start again with --overwrite")
        return str(path)

    def resumed(self, path: Path, step: int, epoch: int, total_steps: int) -> None:
        """A run that was resumed: sweeps what a kill has left, and forgets what came after the checkpoint."""
        checkpoint.sweep(self.directory.checkpoints)
        self.metrics.truncate_after(step)
        self.status(step, epoch)
        say(self.console, f"resumed at step {step:,} of {total_steps:,} from {path.name}")

    # ---- on the way ----

    def status(self, step: int, epoch: int, code: ExitCode | None = None, message: str = "") -> None:
        try:
            self.directory.write_status(step=step, epoch=epoch, exit_code=code, message=message)
        except OSError as error:
            say(self.console, f"status.json cannot be written ({error.strerror or error})", "yellow")

    def log_step(self, step: int, epoch: int, metrics: StepMetrics, skipped_steps: int) -> None:
        values = {name: value for name, value in metrics._asdict().items() if value is not None}
        if skipped_steps:
            values["skipped_steps"] = skipped_steps
        warning = self.metrics.write(step, epoch, **values)
        if warning:
            say(self.console, warning, "yellow")

    def evaluation(self, step: int, epoch: int, numbers: dict[str, float]) -> None:
        """What the monitor has measured; nothing, at the start, where it measures nothing."""
        self.metrics.write(step, epoch, **numbers)
        if numbers:
            say(self.console, evaluation_line(f"epoch {epoch}" if step else "before training", numbers))

    def replaced(self, ledger: Ledger | None) -> None:
        """Says how many images turned bad and were replaced, each time that there are more."""
        entries = [] if ledger is None else ledger.entries()
        replaced = [entry for entry in entries if entry.fate == REPLACED]
        if len(replaced) > self._replaced:
            self._replaced = len(replaced)
            count = f"{len(replaced):,} {'image has' if len(replaced) == 1 else 'images have'}"
            say(
                self.console,
                f"{count} turned bad, replaced by grey (see {LEDGER_NAME}): {replaced[-1].reason}",
                "yellow",
            )

    def saved_s_ago(self) -> float:
        return time.monotonic() - self._saved_at

    def save(self, state: TrainState, epoch: int, *, last_chance: bool) -> None:
        """Writes a checkpoint. A disk that refuses is given a few more chances; the last one that was written stays."""
        try:
            state.save(self.directory.checkpoints)
            checkpoint.prune(self.directory.checkpoints, self.config.run.keep_checkpoints)
            self._failed_saves, self._saved_at = 0, time.monotonic()
        except CheckpointError as error:
            self._failed_saves += 1
            if last_chance or self._failed_saves >= SAVE_ATTEMPTS:
                raise
            say(self.console, f"{error}; training goes on and tries again", "yellow")
        self.status(state.step, epoch)

    # ---- the end ----

    def finish(
        self, backbone: Backbone, step: int, epoch: int, seconds: float, images_per_s: float | None, chance_loss: float
    ) -> None:
        """The backbone under torchvision's names, curves, and what the run was worth."""
        part = temporary(self.directory.backbone)
        save_file({name: tensor.cpu().contiguous() for name, tensor in backbone.state_dict().items()}, part)
        os.replace(part, self.directory.backbone)
        records = read_metrics(self.metrics.path)
        curves(records, self.directory.curves_png, chance_loss)
        self.status(step, epoch, ExitCode.DONE)
        paths = (self.directory.views_png, self.directory.curves_png, self.directory.backbone)
        files = [os.path.relpath(path) for path in paths]
        show_facts(self.console, "done", end_facts(records, seconds, images_per_s, files))

    def failed(self, error: BaseException) -> None:
        write_failure(self.directory, error)


def write_failure(directory: RunDirectory, error: BaseException) -> None:
    """How a run that did not reach its end ended, in status.json; a disk that refuses must not hide the error."""
    with suppress(OSError, ConfigError):
        last = read_status(directory.path)
        code = exit_code(error) or 1
        directory.write_status(
            step=last["step"], epoch=last["epoch"], exit_code=code, message=str(error) or repr(error)
        )
