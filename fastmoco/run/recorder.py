"""Writes the output of a run: configuration, status, metrics, checkpoints, pictures and console messages."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from fastmoco.config import ResolvedConfig
from fastmoco.console import StepMetrics, say, show_facts, shown_path
from fastmoco.errors import CheckpointError, ConfigError, DivergedError, ExitCode, exit_code
from fastmoco.run import checkpoint, data_record
from fastmoco.run.checkpoint_writer import CheckpointWriter
from fastmoco.run.data_record import DataRecord
from fastmoco.run.directory import RunDirectory, read_status
from fastmoco.run.metrics import MetricsWriter, read_metrics
from fastmoco.run.plots import curves, views_grid
from fastmoco.run.report import end_facts, evaluation_line
from fastmoco.run.state import TrainState
from pipelines.augment.presets import Augmentation
from pipelines.data.quarantine import FILE_NAME as LEDGER_NAME
from pipelines.data.quarantine import REPLACED, Ledger
from pipelines.files import replacing
from pipelines.views import Views

SAVE_ATTEMPTS = 3  # consecutive failures to save a checkpoint that end the run


class RunRecorder:
    """Writes the files of a run and reports its progress, on rank 0 only."""

    def __init__(self, directory: RunDirectory, config: ResolvedConfig, console: Console) -> None:
        self.directory, self.config, self.console = directory, config, console
        self.metrics = MetricsWriter(directory.path, tensorboard=config.run.tensorboard)
        self._writer = CheckpointWriter(directory.checkpoints, config.run.keep_checkpoints)
        self._saving, self._saving_since, self._saved_at = (0, 0), -math.inf, -math.inf
        self._failed_saves = self._num_replaced = 0
        self._warned_not_pinned = False

    def close(self) -> None:
        """Wait for the save in progress. If it fails, that is only printed: the run has ended for another reason."""
        try:
            self._writer.wait()
        except (CheckpointError, DivergedError) as error:
            say(self.console, str(error), "yellow")
        finally:
            self._writer.close()
            self.metrics.close()

    # ---- start ----

    def begin(self, views: Views, augmentation: Augmentation) -> None:
        """Start a new run: write its configuration and a picture of `views`, whose keys are in the queries' order."""
        self.directory.write_config(self.config)
        self.status(0, 0)
        views_grid(views.query, views.key, augmentation.mean, augmentation.std, self.directory.views_png)

    def images(self, record: DataRecord | None) -> None:
        """Write what the images contain, with which a resumed run compares them; a failure is only printed."""
        try:
            if record is not None:
                data_record.write(record, self.directory.path / data_record.FILE_NAME)
        except OSError as error:
            say(self.console, f"{data_record.FILE_NAME} cannot be written ({error.strerror or error})", "yellow")

    def find_checkpoint(self) -> str:
        """Path of the newest valid checkpoint; warns about newer ones. Raises CheckpointError if there is none."""
        path, warnings = checkpoint.newest(self.directory.checkpoints)
        for warning in warnings:
            say(self.console, warning, "yellow")
        if path is None:
            raise CheckpointError(f"no checkpoint in {self.directory.checkpoints}: start again with --overwrite")
        return str(path)

    def resumed(self, path: Path, step: int, epoch: int, total_steps: int) -> None:
        """Continue a resumed run: delete leftovers of a killed process, and metrics after the checkpoint."""
        checkpoint.sweep(self.directory.checkpoints)
        self.directory.write_config(self.config)  # some settings may change, such as --epochs
        self.metrics.truncate_after(step)
        self.status(step, epoch)
        say(self.console, f"resumed at step {step:,} of {total_steps:,} from {path.name}")

    # ---- during training ----

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
        """Record the results of an evaluation, which may be empty before training."""
        self.metrics.write(step, epoch, **numbers)
        if numbers:
            say(self.console, evaluation_line(f"epoch {epoch}" if step else "before training", numbers))

    def has_evaluated(self, step: int) -> bool:
        """Whether the metrics have an evaluation of that step, rather than a signal having stopped it."""
        records = read_metrics(self.metrics.path) if self.metrics.path.exists() else []
        return any(record["step"] == step and "loss" not in record for record in records)

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
        """Write the backbone with torchvision's names and the curves, and print the summary."""
        self.finish_saving(attempts=1)
        with replacing(self.directory.backbone) as part:
            save_file({name: tensor.cpu().contiguous() for name, tensor in backbone.state_dict().items()}, part)
        records = read_metrics(self.metrics.path)
        curves(records, self.directory.curves_png, chance_loss)
        self.status(step, epoch, ExitCode.DONE)
        paths = (self.directory.views_png, self.directory.curves_png, self.directory.backbone)
        files = [shown_path(path) for path in paths]
        show_facts(self.console, "done", end_facts(records, seconds, images_per_s, files))

    def failed(self, error: BaseException) -> None:
        write_failure(self.directory, error)


def write_failure(directory: RunDirectory, error: BaseException) -> None:
    """Record in status.json why a run failed; if that cannot be written, it must not hide the error."""
    with suppress(OSError, ConfigError):
        previous = read_status(directory.path)
        code = exit_code(error) or 1
        directory.write_status(
            step=previous["step"], epoch=previous["epoch"], exit_code=code, message=str(error) or repr(error)
        )
