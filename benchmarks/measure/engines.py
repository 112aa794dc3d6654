"""Training steps for the end-to-end benchmarks, built and warmed up: ours as in the trainer, and the plain one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.measure.harness import Reading
from benchmarks.measure.plain import PlainStep, Task
from benchmarks.measure.resources import device_memory, growth, memory_bytes, release_caches
from benchmarks.measure.sample_data import SMALL
from benchmarks.measure.variants import synthetic_views
from fastmoco.config import ResolvedConfig, RunConfig
from fastmoco.device import DTYPES
from fastmoco.distributed.world import World
from fastmoco.run.resolve import resolve
from fastmoco.run.state import build_state
from fastmoco.step.cuda_graph import GraphedStep
from pipelines.data.index import ImageIndex
from pipelines.views import Views


class MeasuredStep(Protocol):
    """A training step. `read_loss` returns the mean loss since the last call, or the last loss, and synchronises."""

    def __call__(self, views: Views) -> object: ...

    def read_loss(self) -> float: ...


@dataclass(frozen=True)
class Engine:
    """A training step that is built and warmed up.

    synthetic     batches to feed it with in place of a loader
    keeps_memory  whether malloc keeps freed memory (`fastmoco.run.malloc`), as in the trainer on a CPU
    memory        what it occupies between steps
    """

    step: Callable[[Views], object]
    read_loss: Callable[[], float]
    synthetic: list[Views]
    keeps_memory: bool
    memory: Reading
    warm_up_s: float


def build_engine(
    build: Callable[[], MeasuredStep], synthetic: list[Views], device: torch.device, *, keeps_memory: bool = False
) -> Engine:
    """Build a step and run it twice on synthetic views."""
    before, began = idle_memory(device), time.perf_counter()
    torch.manual_seed(0)
    step = build()
    for views in synthetic[:2]:
        step(views)
    step.read_loss()
    warm_up_s = time.perf_counter() - began
    return Engine(step, step.read_loss, synthetic, keeps_memory, growth(before, idle_memory(device)), warm_up_s)


def our_engine(config: ResolvedConfig, task: Task, images: ImageIndex, device: torch.device) -> Engine:
    """The step as the trainer builds it from a resolved configuration, with CUDA graph and kernels."""
    synthetic = synthetic_views(task, device, DTYPES[config.run.amp], channels_last=True)
    build = lambda: _TrainerStep(config, task, images, device, synthetic[0])  # noqa: E731
    return build_engine(build, synthetic, device, keeps_memory=device.type == "cpu")


class _TrainerStep:
    def __init__(
        self, config: ResolvedConfig, task: Task, images: ImageIndex, device: torch.device, example: Views
    ) -> None:
        self._task, self._train_step = task, build_state(config, World(device), images).train_step
        graphed = config.run.cuda_graph != "off"
        self._step = GraphedStep(self._train_step, example) if graphed else self._train_step

    def __call__(self, views: Views) -> None:
        self._step(views, self._task.lr, self._task.ema_momentum)

    def read_loss(self) -> float:
        return self._train_step.read_metrics()["loss"]


def plain_engine(task: Task, device: torch.device) -> Engine:
    """Eager, float32 and NCHW, with the loss read in every step."""
    synthetic = synthetic_views(task, device, torch.float32, channels_last=False)
    return build_engine(lambda: PlainStep(task, device), synthetic, device)


def resolve_task(
    task: Task, index: ImageIndex, device: torch.device, *, workers: int, **overrides: Any
) -> ResolvedConfig:
    """The task as a run, with the trainer's automatic choices for this device. Raises ConfigError."""
    config = RunConfig().replace(
        data=index.name,
        pipeline="torch",
        workers=workers,
        aug=augmentation_name(task.side),
        crop_size=task.side,
        arch=task.arch,
        stem=task.stem,
        moco_dim=task.dim,
        moco_k=task.queue,
        moco_m=task.ema_momentum,
        moco_t=task.temperature,
        bn_splits=task.bn_splits,
        batch_size=task.batch_size,
        lr=task.lr,
        wd=task.weight_decay,
        sgd_momentum=task.sgd_momentum,
        allow_large_queue=True,  # the cost of a queue does not depend on its content
    )
    return resolve(config.replace(**overrides), index, device)[0]


def augmentation_name(side: int) -> str:
    """The recipes' augmentation for views of this side."""
    return "cifar" if side <= SMALL else "v2"


def idle_memory(device: torch.device) -> Reading:
    """Memory in use after caches are released; resets the peaks."""
    release_caches(device)
    memory = {"host_bytes": float(memory_bytes()), **device_memory(device)}
    if device.type == "cuda":
        memory["peak_allocated_bytes"] = memory["allocated_bytes"]
    return memory
