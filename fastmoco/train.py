"""The composition root and the training loop: the only place where pipeline, encoders and step are built and run.

The host runs ahead of the device and waits for it only every `log_every` steps, at evaluations and at checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from fastmoco.config import RunConfig
from fastmoco.console import StepMetrics, TrainingProgress, duration, say, show_facts
from fastmoco.device import DTYPES, out_of_memory
from fastmoco.distributed.watchdog import Watchdog
from fastmoco.distributed.world import StopVote
from fastmoco.errors import Interrupted, Preempted, RankLostError
from fastmoco.evaluation.online import OnlineEvaluator
from fastmoco.run.divergence import LossWatch
from fastmoco.run.forecast import Forecast
from fastmoco.run.recorder import RunRecorder
from fastmoco.run.report import show_selection, start_facts
from fastmoco.run.start import RunContext, run_context
from fastmoco.run.state import build_state
from fastmoco.run.thread_count import ThreadCount, tunes_threads
from fastmoco.run.throughput import StepClock, mark_on
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.schedules import Rates
from fastmoco.tuning.select import select
from pipelines.augment.presets import AUGMENTATIONS, with_scale
from pipelines.backends.select import Pipeline, open_pipeline, open_source
from pipelines.errors import DataError
from pipelines.plan.order import orders
from pipelines.plan.planner import Planner
from pipelines.views import Views

SAVE_INTERVAL_S = 60.0  # between checkpoints without --checkpoint-every, since an epoch may be shorter than a save
MAX_DRAWN = 64  # images in views.png


def train(config: RunConfig, console: Console) -> Path:
    """Start or resume a run, train to the last epoch and return its folder. Under torchrun, every rank calls it.

    Raises ConfigError, DataError, CheckpointError, DivergedError or DeviceError; Preempted after a signal, with the
    state saved; RankLostError if another rank has died, AlreadyReportedError if that rank has reported the reason.
    """
    with run_context(config, console) as context:
        trainer = Trainer(context)
        query = trainer.state.model.query
        why = (context.reasons.get("kernels"), trainer.selection.checked)
        reasons = context.reasons | {"device": "; ".join(filter(None, why))}
        facts = start_facts(trainer.config, context.dataset, query, reasons, context.world, context.folder)
        show_facts(context.console, "fastmoco train", facts)
        show_selection(context.console, trainer.selection.notes, trainer.selection.table)
        trainer.run()
        return context.folder


class Trainer:
    """One run, built from a resolved configuration."""

    def __init__(self, context: RunContext) -> None:
        self.config, self.world, self.stop, self.console = context.config, context.world, context.stop, context.console
        config, dataset, device = context.config, context.dataset, context.world.device
        data, model, optim = config.data, config.model, config.optim
        side, batch = config.augment.crop_size, optim.batch_size
        self.augmentation = AUGMENTATIONS[config.augment.aug]
        if config.augment.crop_scale_min is not None:
            self.augmentation = with_scale(self.augmentation, config.augment.crop_scale_min)

        self.planner = Planner(
            dataset.train.sizes,
            seed=config.run.seed,
            batch_size=batch,
            augmentation=self.augmentation,
            shuffle_keys=model.bn_splits != 1,
            rank=self.world.rank,
            world_size=self.world.size,
            order=orders(data.order, dataset.train, config.run.seed, data.order_buffer),
        )
        self.steps_per_epoch = self.planner.steps_per_epoch
        self.total_steps = self.steps_per_epoch * optim.epochs
        self.rates = Rates(config, self.steps_per_epoch)
        self._images = dataset.train
        self._source = source = open_source(data.pipeline, dataset.train, side, device, data.workers)
        self.selection = select(
            config,
            context.auto,
            lambda triton: next(self._open(self.planner, torch.float32, triton).views(0, 1)),
            self.total_steps,
            len(dataset.train),
            self.world,
        )
        self.config = config = self.selection.config
        dtype = DTYPES[config.run.amp]
        self.pipeline = self._open(self.planner, dtype, self.selection.triton_views)
        self.evaluator = OnlineEvaluator(
            config, dataset, source, self.pipeline, self.augmentation, self.world, dtype, context.console
        )
        self.state = build_state(config, self.world, dataset.train)
        self.recorder = None if context.directory is None else RunRecorder(context.directory, config, context.console)
        self.threads = ThreadCount(torch.get_num_threads()) if tunes_threads(config, self.world) else None
        on_step = (lambda _: None) if self.threads is None else self.threads.step
        self.clock = StepClock(batch, on_step=on_step, mark=mark_on(device))
        self.forecast = Forecast(self.total_steps, self.steps_per_epoch, config.run.knn_every)
        candidates = model.moco_k + (model.mechanism != "end-to-end")  # end-to-end: the positive is among the K
        self.chance_loss = self.state.train_step.objective.chance_loss(candidates) * (2 if model.symmetric else 1)
        most_skipped = min(config.run.max_skipped_steps, self.total_steps)
        self.watch = LossWatch(max_skipped=most_skipped, chance_loss=self.chance_loss, amp=config.run.amp)
        self._stopped, self._unevaluated, self._began = False, False, time.monotonic()

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.state.step // self.steps_per_epoch

    def run(self) -> None:
        """Train to the end of the last epoch, from the newest checkpoint with --resume."""
        try:
            self._resume() if self.config.run.resume else self._begin()
            with self.stop.deferred():
                self._steps()
                self.world.on_main(lambda: self._finish(time.monotonic() - self._began))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.world.device, self.config.optim.batch_size, self.config.model.bn_splits) from error
        finally:
            if self.threads is not None:
                self.threads.close()
            if self.recorder is not None:
                self.recorder.close()
            self.pipeline.close()

    def _begin(self) -> None:
        if self.recorder is not None:
            self.recorder.begin(self._first_views(), self.augmentation)
            self.recorder.images(self.state.data_record)
        results: dict[str, float] = {}
        if self.config.run.knn_every:
            results = self._evaluate()
            pixels = self.evaluator.pixels()
            if pixels is not None:
                results["knn_pixels_top1_percent"] = pixels
        if self.recorder is not None:
            self.recorder.evaluation(0, 0, results)
        self._save()
        if self.recorder is not None:  # so that writing it does not disturb the first measured steps
            self.recorder.finish_saving()

    def _evaluate(self) -> dict[str, float]:
        began = time.monotonic()
        results = self.evaluator.evaluate(self.state.model.query)
        self.forecast.evaluation_s = time.monotonic() - began
        return results

    def _evaluate_epoch(self) -> None:
        """Evaluate, unless a signal arrives before the end: the resumed run does it then. Ranks would wait for it."""
        try:
            with self.stop.interrupting() if self.world.size == 1 else nullcontext():
                results = self._evaluate()
        except Interrupted:
            self._unevaluated = True
            return
        if self.recorder is not None:
            self.recorder.evaluation(self.state.step, self.epoch, results)

    def _first_views(self) -> Views:
        """Views of the first images of step 0, all on this rank, with the keys in the order of the queries."""
        dtype, planner = DTYPES[self.config.run.amp], self.planner.preview(MAX_DRAWN)
        return next(self._open(planner, dtype, self.selection.triton_views).views(0, 1))

    def _open(self, planner: Planner, dtype: torch.dtype, triton: bool | None) -> Pipeline:
        data, side, device = self.config.data, self.config.augment.crop_size, self.world.device
        return open_pipeline(
            data.pipeline, self._images, planner, self._source, side, device, dtype, data.workers, triton
        )

    def _resume(self) -> None:
        path = Path(self.world.on_main(lambda: "" if self.recorder is None else self.recorder.find_checkpoint()))
        for note in self.state.load(path, self.total_steps):
            say(self.console, f"resumed although {note}", "yellow")
        if self.recorder is not None:
            self.recorder.resumed(path, self.state.step, self.epoch, self.total_steps)
            self.recorder.images(self.state.data_record)
        evaluated = self.world.on_main(lambda: self.recorder is None or self.recorder.has_evaluated(self.state.step))
        if self._evaluation_is_due() and not evaluated:
            self._evaluate_epoch()

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
        watchdog = Watchdog(self.world.timeout_s, self._stalled, lambda: bool(self.stop))
        with progress, watchdog.watching(self.world.size > 1):
            for views in clock.steps(self._until_stopped()):
                if step is None:
                    with clock.paused(), watchdog.paused():
                        step = GraphedStep(state.train_step, views)
                lr = self.rates.lr(state.step)
                step(views, lr, self.rates.ema_momentum(state.step))
                state.step += 1
                watchdog.feed()
                epoch_ends = state.step % self.steps_per_epoch == 0
                metrics = self._log(lr) if epoch_ends or state.step % config.run.log_every == 0 else None
                if metrics is not None or self.world.device.type == "cpu":  # on a GPU the host may be ahead
                    self._forecast(clock.training_s)
                if metrics is not None:
                    progress.update(state.step, metrics, self.forecast.left_s)
                with clock.paused(), watchdog.paused():
                    if self._evaluation_is_due():
                        self._evaluate_epoch()
                    if self._save_is_due(epoch_ends):
                        self._save()
        if self._stopped and (state.step < self.total_steps or self._unevaluated):
            self.world.on_main(lambda: self._save(last_chance=True))
            signal = self.stop.name if self.stop else "a signal to another rank"
            raise Preempted(f"stopped by {signal} at step {state.step:,}, saved: resume with --resume")

    def _until_stopped(self) -> Iterator[Views]:
        """The remaining batches, until all ranks agree that one of them has received a signal."""
        views, vote = self.pipeline.views(self.state.step, self.total_steps), StopVote(self.world)
        while True:
            self._stopped = vote(bool(self.stop))
            if self._stopped:
                break
            try:
                batch = next(views, None)
            except DataError:
                if not self.stop or self.world.size > 1:
                    raise
                self._stopped = True  # the signal has reached the loader's processes too
                break
            if batch is None:
                break
            yield batch
        vote.close()

    def _log(self, lr: float) -> StepMetrics:
        """Read metrics from the device and record them. Raises DivergedError if the run has diverged."""
        latest = self.state.train_step.read_metrics()
        rates = self.clock.read()
        device = self.world.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        threads = None if self.threads is None else self.threads.threads
        metrics = StepMetrics(latest["loss"], lr, rates.images_per_s, rates.data_wait_percent, memory, threads)
        if self.recorder is not None:
            self.recorder.log_step(self.state.step, self.epoch, metrics, int(latest["skipped_steps"]))
            self.recorder.replaced(self._images.ledger)
        warning = self.watch.check(self.state.step, latest)
        if warning:
            say(self.console, warning, "yellow")
        if self.config.scale.paranoid:
            self.world.check_same(self.state.digests())
        return metrics

    def _forecast(self, training_s: float) -> None:
        """Print once how long the run will take."""
        if self.forecast.mark(self.state.step, training_s):
            resumed, left_s = self.config.run.resume, self.forecast.left_s or 0.0
            total_s = left_s + (0.0 if resumed else time.monotonic() - self._began)
            say(self.console, f"{'the rest takes ' * resumed}about {duration(total_s)} on this machine")

    def _evaluation_is_due(self) -> bool:
        every, step = self.config.run.knn_every, self.state.step
        if not every or not step or step % self.steps_per_epoch:
            return False
        return self.epoch % every == 0 or step == self.total_steps

    def _save_is_due(self, epoch_ends: bool) -> bool:
        """Whether to save now; never on ranks other than 0, whose state is the same."""
        every, step = self.config.run.checkpoint_every, self.state.step
        if self.recorder is None:
            return False
        if every is not None:
            return step % every == 0 or step == self.total_steps
        return epoch_ends and (step == self.total_steps or self.recorder.saved_s_ago() >= SAVE_INTERVAL_S)

    def _save(self, *, last_chance: bool = False) -> None:
        if self.recorder is not None:
            last_chance = last_chance or self.state.step == self.total_steps
            self.recorder.save(self.state, self.epoch, last_chance=last_chance)

    def _finish(self, seconds: float) -> None:
        if self.recorder is not None:
            backbone, rate = self.state.model.query.backbone, self.clock.images_per_s
            self.recorder.finish(backbone, self.state.step, self.epoch, seconds, rate, self.chance_loss)

    def _stalled(self, message: str) -> None:
        """Record that this rank hangs, before the watchdog ends the process."""
        if self.recorder is not None:
            self.recorder.failed(RankLostError(message))
        self.world.report_failure(RankLostError(message))
