"""The rows of compare_peers.py: each has a loader, a step that is warmed up, and a description of its settings."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from typing import Any

import torch

from benchmarks.measure.end_to_end import Case, Images, measure, open_case
from benchmarks.measure.engines import augmentation_name, build_engine, idle_memory, our_engine
from benchmarks.measure.plain import Task
from benchmarks.measure.resources import growth
from benchmarks.measure.turns import attempt
from benchmarks.measure.variants import synthetic_views
from benchmarks.peers.demo import DemoStep, default_loading, demo_dataset
from benchmarks.peers.lightly import DEFAULT as LIGHTLY_LOADING
from benchmarks.peers.lightly import LightlyStep, lightly_dataset
from benchmarks.peers.loader import Loading, endless_views, tuned
from fastmoco.config import ResolvedConfig
from fastmoco.device import DTYPES, pick_amp
from pipelines.augment.presets import AUGMENTATIONS
from pipelines.backends.select import default_workers as cores
from pipelines.data.index import ImageIndex
from pipelines.views import Views

OURS = {"fastmoco-resident": "resident", "fastmoco-torch": "torch"}
PEERS = ("lightly", "lightly-best", "authors", "authors-best")


@dataclass(frozen=True)
class Row:
    """A trainer that is open. `terms` describes its settings."""

    case: Case
    terms: str
    tuning: dict[int, float] | None = None


def start_fork_server(peers: list[str]) -> None:
    """Start the server that forks the peers' workers, with their modules already imported."""
    modules = ["pipelines.backends.torch", "benchmarks.compare_peers"]  # every worker imports the main script
    if any(name.startswith("lightly") for name in peers):
        modules += ["lightly.transforms", "lightly.data"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    forkserver.ensure_running()


def open_ours(
    names: list[str],
    images: Images,
    config: ResolvedConfig,
    task: Task,
    device: torch.device,
    left_out: dict[str, str],
) -> dict[str, Row]:
    """Our rows: two pipelines that share one training step. The reasons of those that fail go into `left_out`."""
    workers = config.data.workers or 0
    engine = attempt(lambda: our_engine(config, task, images.index, device), names[0], left_out)
    if engine is None:
        left_out |= dict.fromkeys(names, left_out[names[0]])
        return {}
    run, rows = config.run, {}
    terms = [run.amp, f"{run.kernels} kernels", *(["CUDA graph"] if run.cuda_graph == "on" else [])]
    for name in names:
        pipeline = OURS[name]

        def opened(pipeline: str = pipeline) -> Case:
            return open_case(pipeline, images, task, device, DTYPES[run.amp], workers, engine)

        if (case := attempt(opened, name, left_out)) is not None:
            rows[name] = Row(case, ", ".join(terms if pipeline == "resident" else [*terms, _plural(workers)]))
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
    default_workers: bool,
) -> Row:
    """Build and warm up a peer's step, and choose its number of workers.

    workers          at its best it uses this number, half or twice as many, whichever is fastest
    tuning_s         duration of each of these measurements
    default_workers  whether the default row uses the peer's own number of workers or `workers`
    """
    at_best = name.endswith("-best")
    amp = "bf16" if at_best and pick_amp("auto", device) == "bf16" else "fp32"  # float16 would need loss scaling
    options: dict[str, Any] = {"symmetric": symmetric, "channels_last": at_best, "dtype": DTYPES[amp]}
    augmentation = AUGMENTATIONS[augmentation_name(task.side)]
    synthetic = synthetic_views(task, device, torch.float32, channels_last=False)
    began = time.perf_counter()
    if name.startswith("lightly"):
        engine = build_engine(lambda: LightlyStep(task, device, **options), synthetic, device)
        before, loading = idle_memory(device), LIGHTLY_LOADING
        dataset = lightly_dataset(index, augmentation, task.side)
    else:
        steps = len(index) // task.batch_size
        engine = build_engine(lambda: DemoStep(task, device, steps_per_epoch=steps, **options), synthetic, device)
        before, loading = idle_memory(device), default_loading(task.side)
        dataset = demo_dataset(index, augmentation, task.side)
    open_s, memory = time.perf_counter() - began, growth(before, idle_memory(device))

    def case_with(loading: Loading) -> Case:
        def batches() -> Iterator[Views]:
            return endless_views(dataset, task.batch_size, device, loading)

        round_of = max(1, min(loading.workers, cores()))  # more workers than cores do not finish at the same time
        return Case(batches, engine, task.batch_size, round_of, memory, open_s)

    if not at_best:
        loading = loading if default_workers else replace(loading, workers=workers)
        return Row(case_with(loading), f"{amp}, {_plural(loading.workers)}")
    choices = {max(1, n) for n in (workers // 2, workers, 2 * workers)}
    cases = {n: case_with(tuned(n)) for n in sorted(choices)}
    rates = {n: measure(case, tuning_s, device)["images_per_s"] for n, case in cases.items()}
    fastest = max(rates, key=lambda n: rates[n])
    return Row(cases[fastest], f"{amp}, channels-last, {_plural(fastest)}", rates)


def _plural(workers: int) -> str:
    return f"{workers} worker{'' if workers == 1 else 's'}"
