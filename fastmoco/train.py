"""The composition root and the loop: the only place that builds pipelines, encoders and the step, and runs them.

The host stays ahead of the device: it reads from it only every `log_every` steps, at evaluations and at checkpoints.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from fastmoco import checkpoint
from fastmoco.clock import StepClock
from fastmoco.config import RunConfig
from fastmoco.console import Reading, TrainingProgress, say, show_facts
from fastmoco.device import DTYPES, describe, make_deterministic, pick_device
from fastmoco.errors import CheckpointError, ConfigError, DeviceError, DivergedError, ExitCode, Preempted, exit_code
from fastmoco.files import temporary
from fastmoco.graph import GraphedStep
from fastmoco.host_memory import keep_freed_memory
from fastmoco.metrics import MetricsWriter, read_metrics
from fastmoco.monitor import Monitor
from fastmoco.pictures import curves, views_grid
from fastmoco.report import end_facts, evaluation_line, start_facts
from fastmoco.resolve import resolve
from fastmoco.rundir import RunDirectory, default_run_name, read_status
from fastmoco.schedules import ema_momentum_at, lr_at
from fastmoco.state import build_state
from fastmoco.stop import StopFlag
from fastmoco.world import World
from pipelines.augment import AUGMENTATIONS, with_scale
from pipelines.backends import open_pipeline, open_source
from pipelines.dataset import MAX_BAD_FRACTION, Dataset, load_dataset
from pipelines.errors import DataError
from pipelines.ledger import FILE_NAME as LEDGER_NAME
from pipelines.ledger import REPLACED, Ledger
from pipelines.plans import Planner

SAVE_SECONDS = 60.0  # between two checkpoints, unless steps were given: an epoch may take less time than saving
SAVE_ATTEMPTS = 3  # checkpoints in a row that may fail before the run gives up


def train(config: RunConfig, console: Console) -> Path:
    """Runs or resumes one run to its end, and returns its folder.

    Raises ConfigError, DataError, CheckpointError, DivergedError or DeviceError, and Preempted where it was asked to
    stop and has saved its state.
    """
    device = pick_device(config.run.device)
    if config.run.deterministic:
        make_deterministic()
    else:
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
    if device.type == "cpu":
        keep_freed_memory()
    data = config.data
    dataset = load_dataset(data.data, data_root=data.data_root, limit=data.limit, bad_images=data.bad_images)
    config, reasons = resolve(config, dataset.train, device)
    folder = Path(config.run.out) if config.run.out else Path("runs") / default_run_name(config)
    directory = RunDirectory.open(folder, resume=config.run.resume, overwrite=config.run.overwrite)
    with StopFlag() as stop:
        try:
            if data.bad_images == "quarantine":
                images = len(dataset.train) + (len(dataset.test) if dataset.test else 0) + len(dataset.quarantine)
                dataset = dataset.with_ledger(
                    Ledger(str(directory.path / LEDGER_NAME), most=int(MAX_BAD_FRACTION * images))
                )
            trainer = Trainer(config, dataset, directory, device, console, stop)
            query = trainer.state.model.query
            show_facts(console, "fastmoco train", start_facts(config, dataset, query, reasons, device, directory.path))
            trainer.run()
        except BaseException as error:
            _note_failure(directory, error)
            raise
        finally:
            directory.close()
    return directory.path


class Trainer:
    """One run. Everything is built here, from a configuration without open fields."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        directory: RunDirectory,
        device: torch.device,
        console: Console,
        stop: StopFlag,
    ) -> None:
        self.config, self.directory, self.device = config, directory, device
        self.console, self.stop = console, stop
        data, model, optim = config.data, config.model, config.optim
        side, batch, dtype = config.augment.crop_size, optim.batch_size, DTYPES[config.run.amp]
        assert config.augment.aug
        assert side
        assert batch
        assert optim.epochs
        assert data.workers is not None
        self.augmentation = AUGMENTATIONS[config.augment.aug]
        if config.augment.crop_scale_min is not None:
            self.augmentation = with_scale(self.augmentation, config.augment.crop_scale_min)

        planner = Planner(
            dataset.train.sizes,
            seed=config.run.seed,
            batch_size=batch,
            augmentation=self.augmentation,
            shuffle_keys=model.bn_splits != 1,
        )
        self.steps_per_epoch = planner.steps_per_epoch
        self.total_steps = self.steps_per_epoch * optim.epochs
        source = open_source(data.pipeline, dataset.train, side, device, data.workers)
        self.pipeline = open_pipeline(data.pipeline, dataset.train, planner, source, side, device, dtype, data.workers)
        self.monitor = Monitor(config, dataset, source, self.pipeline, self.augmentation, World(device), dtype)
        self.state = build_state(config, device, dataset.train)
        self.metrics = MetricsWriter(directory.path, tensorboard=config.run.tensorboard)
        self.clock = StepClock(batch)
        choices = (model.moco_k or 0) + (model.mechanism != "end-to-end")  # there the positive is one of the K keys
        self.chance_loss = math.log(choices) * (2 if model.symmetric else 1)
        self._failed_saves, self._saved_at = 0, -math.inf
        self._ledger, self._replaced = dataset.train.ledger, 0

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.state.step // self.steps_per_epoch

    def run(self) -> None:
        """From the newest checkpoint, or from the start, to the end of the last epoch."""
        began = time.monotonic()
        try:
            self._resume() if self.config.run.resume else self._begin()
            self._steps()
            self._finish(time.monotonic() - began)
        except torch.OutOfMemoryError as error:
            batch, splits = self.config.optim.batch_size or 2, self.config.model.bn_splits or 1
            smaller = max(2 * splits, batch // 2 // splits * splits)
            raise DeviceError(
                f"{describe(self.device)} has too little memory for --batch-size {batch}: start again with "
                f"--batch-size {smaller} --overwrite, or with --checkpoint-activations"
            ) from error
        finally:
            self.metrics.close()
            self.pipeline.close()

    def _begin(self) -> None:
        self.directory.write_config(self.config)
        self._write_status()
        first = next(iter(self.pipeline.views(0, 1)))
        a = self.augmentation
        views_grid(first.query, first.key[first.key_order.argsort()], a.mean, a.std, self.directory.views_png)
        numbers: dict[str, float] = {}
        if self.config.run.knn_every:
            numbers = self.monitor.evaluate(self.state.model.query)
            pixels = self.monitor.pixels()
            if pixels is not None:
                numbers["knn_pixels_top1_percent"] = pixels
        self.metrics.write(0, 0, **numbers)
        if numbers:
            say(self.console, evaluation_line("before training", numbers))
        self._save()

    def _resume(self) -> None:
        path, warnings = checkpoint.newest(self.directory.checkpoints)
        for warning in warnings:
            say(self.console, warning, "yellow")
        if path is None:
            raise CheckpointError(f"no checkpoint in {self.directory.checkpoints}: start again with --overwrite")
        self.state.load(path)
        checkpoint.sweep(self.directory.checkpoints)
        self.metrics.truncate_after(self.state.step)
        self._write_status()
        say(self.console, f"resumed at step {self.state.step:,} of {self.total_steps:,} from {path.name}")

    def _steps(self) -> None:
        config, state, clock = self.config, self.state, self.clock
        progress = TrainingProgress(
            self.console,
            first_step=state.step,
            steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            chance_loss=self.chance_loss,
        )
        step = state.train_step if config.run.cuda_graph == "off" else None
        with progress:
            for views in clock.steps(self._until_stopped()):
                if step is None:
                    with clock.paused():
                        step = GraphedStep(state.train_step, views)
                lr = self._lr()
                step(views, lr, self._ema_momentum())
                state.step += 1
                epoch_ends = state.step % self.steps_per_epoch == 0
                if epoch_ends or state.step % config.run.log_every == 0:
                    progress.update(state.step, self._log(lr))
                with clock.paused():
                    if epoch_ends and self._evaluation_is_due():
                        numbers = self.monitor.evaluate(state.model.query)
                        self.metrics.write(state.step, self.epoch, **numbers)
                        say(self.console, evaluation_line(f"epoch {self.epoch}", numbers))
                    if self._save_is_due(epoch_ends):
                        self._save()
        if self.stop and state.step < self.total_steps:
            self._save(last_chance=True)
            raise Preempted(f"stopped by {self.stop.name} at step {state.step:,}, saved: go on with --resume")

    def _until_stopped(self):
        """The batches that are left, until a signal comes; a loader that the signal has hit too is no error."""
        views = self.pipeline.views(self.state.step, self.total_steps)
        while not self.stop:
            try:
                batch = next(views, None)
            except DataError:
                if self.stop:
                    return
                raise
            if batch is None:
                return
            yield batch

    def _lr(self) -> float:
        optim = self.config.optim
        assert optim.lr is not None
        assert optim.epochs is not None
        return lr_at(
            self.state.step,
            schedule="cosine" if optim.cos else "step" if optim.schedule else "constant",
            base_lr=optim.lr,
            epochs=optim.epochs,
            steps_per_epoch=self.steps_per_epoch,
            milestones=optim.schedule or (),
            warmup_epochs=optim.warmup_epochs,
            final_lr=optim.final_lr,
        )

    def _ema_momentum(self) -> float:
        model = self.config.model
        assert model.moco_m is not None
        schedule = "cosine" if model.moco_m_cos else "constant"
        return ema_momentum_at(self.state.step, schedule=schedule, base=model.moco_m, total_steps=self.total_steps)

    def _log(self, lr: float) -> Reading:
        """Reads the device, writes a line of metrics, and stops a run that has diverged."""
        numbers = self.state.train_step.read_metrics()
        rates = self.clock.read()
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        reading = Reading(numbers["loss"], lr, rates.images_per_s, rates.data_wait_percent, memory)
        values = {name: value for name, value in reading._asdict().items() if value is not None}
        if numbers["skipped_steps"]:
            values["skipped_steps"] = numbers["skipped_steps"]
        warning = self.metrics.write(self.state.step, self.epoch, **values)
        if warning:
            say(self.console, warning, "yellow")
        self._say_replaced()
        if numbers["consecutive_skipped"] >= min(self.config.run.max_skipped_steps, self.total_steps):
            raise DivergedError(
                f"the loss or a gradient was not finite for {numbers['consecutive_skipped']} steps up to step "
                f"{self.state.step:,}: lower --lr, or use --amp fp32; the last checkpoint is from before"
            )
        return reading

    def _say_replaced(self) -> None:
        """Says how many images turned bad and were replaced, each time that there are more."""
        entries = [] if self._ledger is None else self._ledger.entries()
        replaced = [entry for entry in entries if entry.fate == REPLACED]
        if len(replaced) > self._replaced:
            self._replaced = len(replaced)
            count = f"{len(replaced):,} {'image has' if len(replaced) == 1 else 'images have'}"
            say(
                self.console,
                f"{count} turned bad, replaced by grey (see {LEDGER_NAME}): {replaced[-1].reason}",
                "yellow",
            )

    def _evaluation_is_due(self) -> bool:
        every = self.config.run.knn_every
        return bool(every) and (self.epoch % every == 0 or self.state.step == self.total_steps)

    def _save_is_due(self, epoch_ends: bool) -> bool:
        every, step = self.config.run.checkpoint_every, self.state.step
        if every is not None:
            return step % every == 0 or step == self.total_steps
        return epoch_ends and (step == self.total_steps or time.monotonic() - self._saved_at >= SAVE_SECONDS)

    def _save(self, *, last_chance: bool = False) -> None:
        """Writes a checkpoint. A disk that refuses is given a few more chances; the last one that was written stays."""
        try:
            self.state.save(self.directory.checkpoints)
            checkpoint.prune(self.directory.checkpoints, self.config.run.keep_checkpoints)
            self._failed_saves, self._saved_at = 0, time.monotonic()
        except CheckpointError as error:
            self._failed_saves += 1
            if last_chance or self._failed_saves >= SAVE_ATTEMPTS or self.state.step == self.total_steps:
                raise
            say(self.console, f"{error}; training goes on and tries again", "yellow")
        self._write_status()

    def _write_status(self, code: ExitCode | None = None, message: str = "") -> None:
        try:
            self.directory.write_status(step=self.state.step, epoch=self.epoch, exit_code=code, message=message)
        except OSError as error:
            say(self.console, f"status.json cannot be written ({error.strerror or error})", "yellow")

    def _finish(self, seconds: float) -> None:
        self._save_backbone()
        records = read_metrics(self.metrics.path)
        curves(records, self.directory.curves_png, self.chance_loss)
        self._write_status(ExitCode.DONE)
        paths = (self.directory.views_png, self.directory.curves_png, self.directory.backbone)
        files = [os.path.relpath(path) for path in paths]
        show_facts(self.console, "done", end_facts(records, seconds, self.clock.images_per_s, files))

    def _save_backbone(self) -> None:
        """The query encoder's backbone under torchvision's names, in torchvision's layout."""
        state = self.state.model.query.backbone.state_dict()
        part = temporary(self.directory.backbone)
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, part)
        os.replace(part, self.directory.backbone)


def _note_failure(directory: RunDirectory, error: BaseException) -> None:
    """How a run that did not reach its end ended, in status.json; a disk that refuses must not hide the error."""
    with suppress(OSError, ConfigError):
        last = read_status(directory.path)
        code = exit_code(error) or 1
        directory.write_status(
            step=last["step"], epoch=last["epoch"], exit_code=code, message=str(error) or repr(error)
        )
