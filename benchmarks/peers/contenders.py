"""The contenders of peers.py: each is opened here, with a loader, a step that is warmed up, and its terms in words."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from typing import Any, Protocol

import torch

from benchmarks.measure.end_to_end import (
    Case,
    Engine,
    Images,
    augmentation_name,
    growth,
    held,
    measure,
    open_case,
    our_engine,
)
from benchmarks.measure.ladder import synthetic_views
from benchmarks.measure.plain import Task
from benchmarks.peers.demo import DemoStep, default_loading, demo_dataset
from benchmarks.peers.lightly import DEFAULT as LIGHTLY_LOADING
from benchmarks.peers.lightly import LightlyStep, lightly_dataset
from benchmarks.peers.loader import Loading, endless_views, tuned
from fastmoco.config import ResolvedConfig
from fastmoco.device import DTYPES, pick_amp
from pipelines.augment.presets import AUGMENTATIONS
from pipelines.backends.select import default_workers
from pipelines.data.index import ImageIndex
from pipelines.views import Views

OURS = {"fastmoco-resident": "resident", "fastmoco-torch": "torch"}
PEERS = ("lightly", "lightly-best", "authors", "authors-best")


class PeerStep(Protocol):
    """One of a peer's training steps, and the mean loss since that was last asked for."""

    def __call__(self, views: Views) -> object: ...

    def read_loss(self) -> float: ...


@dataclass(frozen=True)
class Row:
    """A contender that is open. `terms` is what it runs with, in words."""

    case: Case
    terms: str
    tuning: dict[int, float] | None = None


def start_fork_server(peers: list[str]) -> None:
    """What the peers' workers need is imported once, by the server that they are forked from."""
    modules = ["pipelines.backends.torch", "benchmarks.compare_peers"]  # every worker imports this script again
    if any(name.startswith("lightly") for name in peers):
        modules += ["lightly.transforms", "lightly.data"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    forkserver.ensure_running()


def open_ours(names: list[str], images: Images, config: ResolvedConfig, task: Task, device: torch.device) -> dict[str, Row]:
    """One training step behind both pipelines, which use it in turn. `config` has no open fields."""
    workers = config.data.workers or 0
    engine = our_engine(config, task, images.index, device)
    run, rows = config.run, {}
    terms = [run.amp, f"{run.kernels} kernels", *(["CUDA graph"] if run.cuda_graph == "on" else [])]
    for name in names:
        pipeline = OURS[name]
        case = open_case(pipeline, images, task, device, DTYPES[run.amp], workers, engine)
        rows[name] = Row(case, ", ".join(terms if pipeline == "resident" else [*terms, _count(workers)]))
    return rows


def open_peer(
    name: str,
    index: ImageIndex,
    task: Task,
    device: torch.device,
    *,
    symmetric: bool,
    workers: int,
    tuning_s: float,
    its_default: bool,
) -> Row:
    """Builds and warms up its step, and finds its number of workers.

    workers              at its best it has so many, half or twice as many, whichever is fastest
    tuning_s             how long each of these is measured
    its_default          whether, as it comes, it has its own number of workers, or `workers` too
    """
    at_best = name.endswith("-best")
    amp = "bf16" if at_best and pick_amp("auto", device) == "bf16" else "fp32"  # float16 would need loss scaling
    switches: dict[str, Any] = {"symmetric": symmetric, "channels_last": at_best, "dtype": DTYPES[amp]}
    augmentation = AUGMENTATIONS[augmentation_name(task.side)]
    began = time.perf_counter()
    if name.startswith("lightly"):
        engine = _engine(lambda: LightlyStep(task, device, **switches), task, device)
        before, loading = held(device), LIGHTLY_LOADING
        dataset = lightly_dataset(index, augmentation, task.side)
    else:
        steps = len(index) // task.batch_size
        engine = _engine(lambda: DemoStep(task, device, steps_per_epoch=steps, **switches), task, device)
        before, loading = held(device), default_loading(task.side)
        dataset = demo_dataset(index, augmentation, task.side)
    open_s, held_by_data = time.perf_counter() - began, growth(before, held(device))

    def case_with(loading: Loading) -> Case:
        def batches() -> Iterator[Views]:
            return endless_views(dataset, task.batch_size, device, loading)

        round_of = max(1, min(loading.workers, default_workers()))  # more than there are cores do not end together
        return Case(batches, engine, task.batch_size, round_of, held_by_data, open_s)

    if not at_best:
        loading = loading if its_default else replace(loading, workers=workers)
        return Row(case_with(loading), f"{amp}, {_count(loading.workers)}")
    choices = {max(1, n) for n in (workers // 2, workers, 2 * workers)}
    cases = {n: case_with(tuned(n)) for n in sorted(choices)}
    rates = {n: measure(case, tuning_s, device)["images_per_s"] for n, case in cases.items()}
    fastest = max(rates, key=lambda n: rates[n])
    return Row(cases[fastest], f"{amp}, channels-last, {_count(fastest)}", rates)


def _engine(build: Callable[[], PeerStep], task: Task, device: torch.device) -> Engine:
    synthetic = synthetic_views(task, device, torch.float32, channels_last=False)
    before, began = held(device), time.perf_counter()
    torch.manual_seed(0)
    step = build()
    for views in synthetic[:2]:
        step(views)
    step.read_loss()
    return Engine(
        step,
        step.read_loss,
        synthetic,
        keeps_memory=False,
        held=growth(before, held(device)),
        warm_up_s=time.perf_counter() - began,
    )


def _count(workers: int) -> str:
    return f"{workers} worker{'' if workers == 1 else 's'}"
