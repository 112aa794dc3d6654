"""The choice of how a configuration is trained: the preferred way that is right, or the fastest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastmoco.config import ResolvedConfig
from fastmoco.device import DTYPES
from fastmoco.distributed.world import World
from fastmoco.errors import ConfigError
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.kernels import triton_missing
from fastmoco.step.train_step import TrainStep
from fastmoco.tuning import cache
from fastmoco.tuning.candidates import Auto, Candidate, variations, without_graph
from fastmoco.tuning.check import Checker, Verdict, build_for, views_failure
from fastmoco.tuning.timing import release, step_seconds
from pipelines.backends.select import Pipeline
from pipelines.views import Views

WORTH_S = 20 * 60  # training time from which --tune auto measures: that takes about a minute
COMPILE_WORTH_S = 60 * 60  # and from which it tries torch.compile, which takes minutes
FASTER = 0.98  # a candidate must need less than this share of the best one's time to replace it


@dataclass
class Selection:
    """config        the run with the chosen values
    checked       what was compared, as text; empty if nothing was
    notes         what was left out, and why, one line each
    triton_views  False if augmentation must not use Triton
    table         (candidate, milliseconds per step, chosen) of what was timed
    """

    config: ResolvedConfig
    checked: str = ""
    notes: list[str] = field(default_factory=list)
    triton_views: bool | None = None
    table: list[tuple[str, float, bool]] = field(default_factory=list)


def select(
    config: ResolvedConfig,
    auto: Auto,
    open_pipeline: Callable[[torch.dtype, bool | None, bool], Pipeline],
    steps: int,
    images: int,
    world: World,
    graph: Callable[[TrainStep, Views], GraphedStep] = GraphedStep,
) -> Selection:
    """Check and tune a run as --check and --tune ask for.

    auto           fields of `config` that may change
    open_pipeline  opens that of the run with other values of `dtype`, `triton` and `prefetch`; called only if needed
    steps          of the run, on `images` images
    graph          captures a step

    Raises ConfigError if a field given by name cannot be used, or with --check strict any other.
    """
    options, cuda = config.run, world.device.type == "cuda"
    checks = options.check != "off" and (cuda or _is_fast(Candidate.of(config)))
    tunes = not options.deterministic and (options.tune == "now" or (options.tune == "auto" and cuda and bool(auto)))
    if not (checks or tunes):
        return Selection(config)
    views, failure = _copied(next(open_pipeline(torch.float32, False, True).views(0, 1))), None
    if cuda and triton_missing() is None and options.check != "off":
        failure = views_failure(lambda: next(open_pipeline(torch.float32, True, True).views(0, 1)), views)
        if failure is not None and options.check == "strict":
            raise ConfigError(f"--check strict: augmentation in Triton: {failure}")
    triton_views = None if failure is None else False

    def batches(candidate: Candidate) -> Iterator[Views]:
        pipeline = open_pipeline(DTYPES[candidate.amp], triton_views, candidate.prefetch == "on")
        return (_of_one_rank(batch, world) for batch in pipeline.views(0, steps))

    views = _of_one_rank(views, world)
    selection = Selector(config, auto, views, steps, images, world, batches, tunes=tunes, graph=graph).run()
    if cuda:
        torch.cuda.reset_peak_memory_stats(world.device)  # the reference may need more than the run itself
    if failure is not None:
        selection.notes.append(f"left out augmentation in Triton: {failure}")
        selection.triton_views = triton_views
    return selection


class Selector:
    """Chooses among the fields in `auto`; the arguments are those of `select`.

    views    the first batch, float32, on the device: all pairs, or one rank's share
    batches  opens the batches of the run as a candidate loads them
    tunes    whether to time candidates
    path     of the cache
    """

    def __init__(
        self,
        config: ResolvedConfig,
        auto: Auto,
        views: Views,
        steps: int,
        images: int,
        world: World,
        batches: Callable[[Candidate], Iterator[Views]],
        path: Path | None = None,
        tunes: bool = False,
        graph: Callable[[TrainStep, Views], GraphedStep] = GraphedStep,
    ) -> None:
        self._config, self._auto, self._views, self._images, self._world = config, auto, views, images, world
        self._steps, self._graph, self._tunes, self._batches = steps, graph, tunes, batches
        self._path = cache.cache_path() if path is None else path
        self._key = cache.key(config, auto, world.device, world.size)
        self._local = _local(config, world.size)
        self._checker = Checker(self._local, views, images, world.device, graph)
        self._selection = Selection(config)
        self._timed: list[tuple[Candidate, str, float]] = []  # candidate, its name, milliseconds per step

    def run(self) -> Selection:
        options, tunes = self._config.run, self._tunes
        chosen = Candidate.of(self._config)
        if tunes and options.tune == "auto":
            remembered = self._on_main(lambda: cache.load(self._path, self._key))
            if remembered is not None:
                chosen, tunes = remembered, False
        if options.check != "off":
            chosen = self._first_that_passes(chosen)
        if tunes:
            chosen = self._on_main(lambda: self._fastest(chosen)) or chosen
        self._selection.config = chosen.apply(self._config)
        return self._selection

    def _on_main(self, function: Callable[[], Candidate | None]) -> Candidate | None:
        """The result of rank 0 on every rank."""

        def call() -> dict[str, Any] | None:
            candidate = function()
            return None if candidate is None else asdict(candidate)

        fields = self._world.on_main(call)
        return None if fields is None else Candidate(**fields)

    # ---- check ----

    def _first_that_passes(self, preferred: Candidate) -> Candidate:
        """The first candidate that all ranks find right."""
        first = preferred.apply(self._config)
        failures: list[str] = []
        for candidate in without_graph(first, self._auto, self._world.device):
            if not _is_fast(replace(candidate, cuda_graph=first.run.cuda_graph)):
                return candidate  # plain PyTorch is what the others are compared with
            verdict = self._passes(candidate)
            if verdict.failure is not None:
                failures.append(f"{candidate}: {verdict.failure}")
                self._fail(failures[-1])
                continue
            if first.run.cuda_graph == "on":
                graphed = replace(candidate, cuda_graph="on")
                captured = self._passes(graphed)
                if captured.failure is None:
                    candidate, verdict = graphed, captured
                else:
                    failures.append(f"CUDA graph: {captured.failure}")
                    if "cuda_graph" not in self._auto:
                        break
                    self._fail(failures[-1])
            of = "" if self._checker.images == len(self._views.query) else f" on {self._checker.images} images"
            self._selection.checked = f"first step compared with plain PyTorch{of}: {verdict}"
            return candidate
        raise ConfigError(
            f"the first step is not right in the way asked for ({failures[-1]}): leave out --amp, --kernels, --compile "
            "or --cuda-graph, so that another one is chosen"
        )

    def _fail(self, line: str) -> None:
        if self._config.run.check == "strict":
            raise ConfigError(f"--check strict: {line}")
        self._selection.notes.append(f"left out {line}")

    def _passes(self, candidate: Candidate) -> Verdict:
        """The verdict of this rank, or of the first one on which the candidate fails."""
        verdict = self._checker.check(candidate)
        if self._world.size == 1:
            return verdict
        failed = torch.tensor([float(verdict.failure is not None)], device=self._world.device)
        if self._world.all_reduce(failed).wait().item() and verdict.failure is None:
            return Verdict("it failed on another device", verdict.errors)
        return verdict

    # ---- tuning ----

    def _fastest(self, champion: Candidate) -> Candidate:
        """Vary one dimension after the other; two candidates are alive at a time, and are timed in turns."""
        (seconds,) = self._time([champion])
        self._timed.append((champion, str(champion), 1e3 * seconds))
        training_s = self._steps * seconds
        now = self._config.run.tune == "now"
        if not now and training_s < WORTH_S:
            return champion
        compiles = (now or training_s >= COMPILE_WORTH_S) and self._world.size == 1
        dimension, device = 0, self._world.device
        while dimension < len(options := variations(champion, self._config, self._auto, device, compiles=compiles)):
            for challenger in options[dimension]:
                champion = self._faster(champion, challenger)
            dimension += 1
        self._selection.table = [(name, ms, c == champion) for c, name, ms in self._timed]
        try:
            cache.store(self._path, self._key, champion, {name: ms for _, name, ms in self._timed})
        except OSError as error:
            self._selection.notes.append(f"the choice is not remembered: {self._path} ({error.strerror or error})")
        return champion

    def _faster(self, champion: Candidate, challenger: Candidate) -> Candidate:
        """The challenger, if it is right and faster."""
        check = self._config.run.check != "off" and challenger.arithmetic != champion.arithmetic
        verdict = self._checker.check(challenger) if check else Verdict(None, {})
        if verdict.failure is not None:
            self._fail(f"{challenger}: {verdict.failure}")
            return champion
        loading = challenger.prefetch != champion.prefetch
        try:
            best_s, new_s = self._time([champion, challenger], loading)
        except torch.OutOfMemoryError:  # both at once do not fit
            release(self._world.device)
            (best_s,), (new_s,) = self._time([champion], loading), self._time([challenger], loading)
        if loading:
            self._timed += [(c, f"{c}, with loading", 1e3 * s) for c, s in ((champion, best_s), (challenger, new_s))]
        else:
            best_ms = next(ms for candidate, _, ms in self._timed if candidate == champion)
            self._timed.append((challenger, str(challenger), best_ms * new_s / best_s))  # of the same moment
        return challenger if new_s < FASTER * best_s else champion

    def _time(self, candidates: list[Candidate], loading: bool = False) -> list[float]:
        """Seconds per step of each, on the first batch or with the loading of every batch."""
        device = self._world.device
        threads = torch.get_num_threads()
        try:
            return step_seconds([self._step(candidate, threads, loading) for candidate in candidates], device)
        finally:
            torch.set_num_threads(threads)
            release(device)

    def _step(self, candidate: Candidate, threads: int, loading: bool) -> Callable[[], None]:
        """A step of its own, at a learning rate of zero."""
        dtype = DTYPES[candidate.amp]
        first = self._views
        views = Views(first.query.to(dtype), first.key.to(dtype), first.key_order, first.index)
        batches = self._forever(candidate) if loading else itertools.repeat(views)
        step = build_for(candidate, self._local, len(views.query), self._images, self._world.device)
        call = self._graph(step, views) if candidate.cuda_graph == "on" else step

        def run() -> None:
            if self._world.device.type == "cpu":
                torch.set_num_threads(candidate.cpu_threads or threads)
            call(next(batches), 0.0, 1.0)

        return run

    def _forever(self, candidate: Candidate) -> Iterator[Views]:
        while True:
            yield from self._batches(candidate)


def _copied(views: Views) -> Views:
    """A pipeline may reuse its memory."""
    return Views(views.query.clone(), views.key.clone(), views.key_order.clone(), views.index.clone())


def _of_one_rank(views: Views, world: World) -> Views:
    """The batch as a rank trains on it on its own: its keys may be of different images from its queries."""
    if world.size == 1:
        return views
    return Views(views.query, views.key, torch.arange(len(views.query), device=world.device), views.index)


def _is_fast(candidate: Candidate) -> bool:
    """Whether it is anything but eager float32 PyTorch."""
    return candidate.arithmetic != Candidate(amp="fp32")


def _local(config: ResolvedConfig, ranks: int) -> ResolvedConfig:
    """The settings of one of several ranks on its own, which has its share of the batch norm groups."""
    splits = max(1, config.model.bn_splits // ranks)
    if ranks == 1:
        return config
    return ResolvedConfig.of(config.replace(bn_splits=splits, batch_size=config.optim.batch_size // ranks))
