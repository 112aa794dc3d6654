"""The composition root and the training loop: the only place where pipeline, encoders and step are built and run.

The host runs ahead of the device and waits for it only every `log_every` steps, at evaluations and at checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from fastmoco.backbones.read import read_init
from fastmoco.config import RunConfig
from fastmoco.console import StepMetrics, TrainingProgress, duration, resume_command, say, show_facts
from fastmoco.device import DTYPES, out_of_memory
from fastmoco.distributed.watchdog import Watchdog
from fastmoco.distributed.world import StopVote
from fastmoco.errors import Interrupted, Preempted, RankLostError
from fastmoco.evaluation.online import OnlineEvaluator
from fastmoco.model.architectures import check_available
from fastmoco.run.advice import show_advice
from fastmoco.run.divergence import LossWatch, last_good, not_finite
from fastmoco.run.due import Due
from fastmoco.run.forecast import Forecast
from fastmoco.run.plan import planner_of
from fastmoco.run.recorder import RunRecorder, checkpoint_at
from fastmoco.run.report import show_selection, start_facts
from fastmoco.run.start import RunContext, run_context
from fastmoco.run.start_record import StartRecord
from fastmoco.run.state import build_state
from fastmoco.run.thread_count import ThreadCount, tunes_threads
from fastmoco.run.throughput import StepClock, mark_on, usage_of
from fastmoco.step.schedules import Rates
from fastmoco.tuning.batch_size import fit_batch
from fastmoco.tuning.capture import captured
from fastmoco.tuning.select import select
from pipelines.backends.select import Pipeline, open_pipeline, open_source
from pipelines.errors import DataError
from pipelines.plan.planner import Planner
from pipelines.views import Views

MAX_DRAWN = 16  # images in views.png


def train(config: RunConfig, console: Console, from_recipe: Collection[str] = ()) -> Path:
    """Start or resume a run, train to the last epoch and return its folder. Under torchrun, every rank calls it.

    from_recipe  fields that nobody chose for these images: a queue or batch is reduced to as many as there are

    Raises ConfigError, DataError, CheckpointError, DivergedError or DeviceError; Preempted after a signal, with the
    state saved; RankLostError if another rank has died, AlreadyReportedError if that rank has reported the reason.
    """
    check_available(config.model.arch)
    with run_context(config, console, read_init, fit_batch, from_recipe) as context:
        trainer = Trainer(context)
        query = trainer.state.model.query
        why = (context.reasons.get("kernels"), context.reasons.get("compile"), trainer.selection.checked)
        reasons = context.reasons | {"device": "; ".join(filter(None, why))}
        facts = start_facts(trainer.config, context.dataset, query, reasons, context.world, context.folder)
        show_facts(context.console, "fastmoco train", facts)
        show_advice(context.console, trainer.config, len(context.dataset.train), trainer.steps_per_epoch)
        show_selection(context.console, trainer.selection.notes, trainer.selection.table)
        if trainer.recorder is not None:
            trainer.recorder.start = StartRecord(facts)
        trainer.run()
        return context.folder


class Trainer:
    """One run, built from a resolved configuration."""

    def __init__(self, context: RunContext) -> None:
        self.config, self.world, self.stop, self.console = context.config, context.world, context.stop, context.console
        config, dataset, device = context.config, context.dataset, context.world.device
        self.folder = context.folder
        data, batch, side = config.data, config.optim.batch_size, config.augment.crop_size
        self.planner = planner_of(config, dataset.train, self.world)
        self.augmentation = self.planner.augmentation
        self.steps_per_epoch = self.planner.steps_per_epoch
        self.total_steps, self.due = self.steps_per_epoch * config.optim.epochs, Due(config, self.steps_per_epoch)
        self.rates = Rates(config, self.steps_per_epoch)
        self._images = dataset.train
        self._source = source = open_source(data.pipeline, dataset.train, side, device, data.workers)
        self.selection = select(
            config, context.auto, partial(self._open, self.planner), self.total_steps, len(dataset.train), self.world
        )
        self.config = config = self.selection.config
        dtype = DTYPES[config.run.amp]
        self.pipeline = self._open(self.planner, dtype, self.selection.triton_views, config.run.prefetch == "on")
        self.evaluator = OnlineEvaluator(
            config, dataset, source, self.pipeline, self.augmentation, self.world, dtype, context.console
        )
        self.state = build_state(config, self.world, dataset.train, context.init)
        self.recorder = None if context.directory is None else RunRecorder(context.directory, config, context.console)
        self.threads = ThreadCount(torch.get_num_threads()) if tunes_threads(config, self.world) else None
        on_step = (lambda _: None) if self.threads is None else self.threads.step
        self.clock, self.device_usage = StepClock(batch, on_step=on_step, mark=mark_on(device)), usage_of(device)
        self.forecast = Forecast(self.total_steps, self.steps_per_epoch, config.run.knn_every)
        self.chance_loss = self.state.chance_loss
        context.plan(self.total_steps, self.steps_per_epoch, self.chance_loss)
        self._requires_graph = "cuda_graph" not in context.auto or config.run.check == "strict"
        good = partial(last_good, context.folder, self.world, self.recorder and self.recorder.finish_saving)
        self.watch = LossWatch(config.run, self.total_steps, self.chance_loss, good)
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
        source = self.config.run.resume_from
        if source is not None:
            path = Path(self.world.on_main(lambda: str(checkpoint_at(Path(source)))))
            self._load(path)
            say(self.console, f"goes on at step {self.state.step:,} of {self.total_steps:,} from {path}")
        if self.recorder is not None:
            self.recorder.begin(self._first_views(), self._images, self.augmentation, self.state.step, self.epoch)
            self.recorder.images(self.state.data_record)
        results: dict[str, float] = {}
        if self.config.run.knn_every:
            results = self._evaluate()
            pixels = self.evaluator.pixels()
            if pixels is not None:
                results["knn_pixels_top1_percent"] = pixels
        if self.recorder is not None:
            self.recorder.evaluation(self.state.step, self.epoch, results, self.chance_loss, len(self._images))
            self._save()
            self.recorder.finish_saving()  # so that writing it does not disturb the first measured steps

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
            self.recorder.evaluation(self.state.step, self.epoch, results, self.chance_loss, len(self._images))

    def _first_views(self) -> Views:
        """Views of the first images of step 0, all on this rank, with the keys in the order of the queries."""
        dtype, planner = DTYPES[self.config.run.amp], self.planner.preview(MAX_DRAWN)
        return next(self._open(planner, dtype, self.selection.triton_views).views(0, 1))

    def _open(self, planner: Planner, dtype: torch.dtype, triton: bool | None, prefetch: bool = True) -> Pipeline:
        data, side, device = self.config.data, self.config.augment.crop_size, self.world.device
        return open_pipeline(
            data.pipeline, self._images, planner, self._source, side, device, dtype, data.workers, triton, prefetch
        )

    def _resume(self) -> None:
        path = Path(self.world.on_main(lambda: "" if self.recorder is None else self.recorder.find_checkpoint()))
        self._load(path)
        step = self.state.step
        if self.recorder is not None:
            self.recorder.resumed(path, step, self.epoch, self.total_steps)
            self.recorder.images(self.state.data_record)
        evaluated = self.world.on_main(lambda: self.recorder is None or self.recorder.has_evaluated(step))
        if step == self.total_steps:
            self._judge(self.state.train_step.read_metrics(check_state=True))
        if self.due.evaluation(step) and not evaluated:
            self._evaluate_epoch()

    def _load(self, path: Path) -> None:
        for line in self.state.load(path, self.steps_per_epoch):
            say(self.console, line, "yellow")

    def _steps(self) -> None:
        config, state, clock = self.config, self.state, self.clock
        self.forecast.begin(state.step)
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
                        step, failure = captured(state.train_step, views, self.world, self._requires_graph)
                    if failure is not None:
                        say(self.console, f"left out CUDA graph: {failure}", "yellow")
                lr = self.rates.lr(state.step)
                step(views, lr, self.rates.ema_momentum(state.step))
                state.step += 1
                watchdog.feed()
                metrics = self._log(lr) if self.due.log(state.step) else None
                if metrics is not None or self.world.device.type == "cpu":  # on a GPU the host may be ahead
                    self._forecast(clock.training_s)
                if metrics is not None:
                    progress.update(state.step, metrics, self.forecast.left_s)
                with clock.paused(), watchdog.paused():
                    if self.due.evaluation(state.step):
                        self._evaluate_epoch()
                    if self.recorder is not None and self.due.checkpoint(state.step, self.recorder.saved_s_ago):
                        self._save()  # on rank 0: the state of the others is the same
        if self._stopped and (state.step < self.total_steps or self._unevaluated):
            self.world.on_main(lambda: self._save(last_chance=True))
            signal = self.stop.name if self.stop else "a signal to another rank"
            how = f"resume with: {resume_command(self.folder)}"
            raise Preempted(f"stopped by {signal} at step {state.step:,}, saved: {how}")

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
        usage = self.device_usage()  # while the device works
        latest = self.state.train_step.read_metrics(check_state=True)
        rates = self.clock.read()
        threads = None if self.threads is None else self.threads.threads
        metrics = StepMetrics(latest["loss"], lr, *rates, usage.memory_bytes, threads, usage.power_w)
        if self.recorder is not None:
            self.recorder.log_step(self.state.step, self.epoch, metrics, int(latest["skipped_steps"]))
            self.recorder.replaced(self._images.ledger)
        self._judge(latest)
        if self.config.scale.paranoid:
            self.world.check_same(self.state.digests())
        return metrics

    def _judge(self, latest: Mapping[str, float]) -> None:
        """Raise DivergedError if the run has diverged; all ranks do, because they have the same numbers."""
        step = self.state.step
        bad = not_finite(self.state.tensors()) if latest["state_not_finite"] else ()
        if warning := self.watch.check(step, latest, bad, last=step == self.total_steps):
            say(self.console, warning, "yellow")

    def _forecast(self, training_s: float) -> None:
        """Print once how long the run will take."""
        if self.forecast.mark(self.state.step, training_s):
            run, left_s = self.config.run, self.forecast.left_s or 0.0
            resumed = run.resume or run.resume_from is not None
            total_s = left_s + (0.0 if resumed else time.monotonic() - self._began)
            say(self.console, f"{'the rest takes ' * resumed}about {duration(total_s)} on this machine")

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
