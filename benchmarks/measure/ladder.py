"""The rungs from the plain training step to ours, and how one of them is built, warmed up and read.

A rung that someone adds is one more entry of LADDER.
"""

from __future__ import annotations

import gc
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure.harness import Reading, seconds_per_call
from benchmarks.measure.plain import PlainStep, Task
from benchmarks.measure.resources import device_memory, peak_resident_bytes, reset_peak_resident, resident_bytes
from fastmoco.distributed.world import World
from fastmoco.model.encoder import build_encoder
from fastmoco.model.key_queue import KeyQueue
from fastmoco.model.moco import MoCo
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views

Step = Callable[[Views], object]
CONFIGS = {
    "cifar": Task(arch="resnet18", stem="cifar", side=32, batch_size=512, queue=4096, bn_splits=8),
    "r50": Task(
        arch="resnet50", stem="imagenet", side=224, batch_size=256, queue=65536, bn_splits=8, ema_momentum=0.999
    ),
}
_LONG_S = 2.0  # so long a step needs none before it to be read
BATCHES = 4  # different ones, so that no step finds its input in a cache


@dataclass(frozen=True)
class Variant:
    """One step of the ladder; `build` is given the task, the device, the 16-bit type and the compile mode.

    dtype         another 16-bit type than the ladder's
    keeps_memory  whether malloc keeps what is freed (`fastmoco.run.malloc`), as `fastmoco train` has it on a CPU
    only_on       "cuda" or "cpu", where the change means something on one of them alone
    """

    name: str
    change: str
    build: Callable[[Task, torch.device, torch.dtype, str], Step]
    channels_last: bool = True
    low_precision: bool = True
    dtype: torch.dtype | None = None
    keeps_memory: bool = False
    only_on: str | None = None


def train_step(task: Task, world: World, dtype: torch.dtype, **options: Any) -> TrainStep[KeyQueue]:
    """TrainStep as the recipes have it, on the world's device; the task is that of all its ranks together."""
    encoder = build_encoder(task.arch, stem=task.stem, dim=task.dim, bn_splits=task.bn_splits)
    return TrainStep(
        MoCo(encoder, world=world).to(world.device),
        KeyQueue(task.queue, task.dim, torch.Generator().manual_seed(0)).to(world.device),
        temperature=task.temperature,
        symmetric=False,
        sgd_momentum=task.sgd_momentum,
        weight_decay=task.weight_decay,
        dtype=dtype,
        **options,
    )


def _ours(
    task: Task,
    device: torch.device,
    dtype: torch.dtype,
    compile: str = "off",
    *,
    kernels: str = "torch",
    graph: bool = False,
) -> Step:
    """`train_step` of one rank; the graph is captured from the first batch."""
    step = train_step(task, World(device), dtype, compile=compile, kernels=kernels)
    if not graph:
        return lambda views: step(views, task.lr, task.ema_momentum)
    captured: list[GraphedStep] = []

    def run(views: Views) -> None:
        if not captured:
            captured.append(GraphedStep(step, views))
        captured[0](views, task.lr, task.ema_momentum)

    return run


LADDER = (
    Variant("plain", "eager, fp32, NCHW", lambda t, d, h, c: PlainStep(t, d), channels_last=False, low_precision=False),
    Variant("channels-last", "+ channels-last, our split BN", lambda t, d, h, c: PlainStep(t, d, channels_last=True),
         low_precision=False),
    Variant("amp", "+ 16-bit autocast", lambda t, d, h, c: PlainStep(t, d, channels_last=True, dtype=h)),
    Variant("one-pass", "+ SGD and EMA in one pass",
         lambda t, d, h, c: PlainStep(t, d, channels_last=True, dtype=h, one_pass=True)),
    Variant("trainstep", "+ no stored logits, no host read", lambda t, d, h, c: _ours(t, d, h)),
    Variant("kept-memory", "+ freed memory kept", lambda t, d, h, c: _ours(t, d, h), keeps_memory=True, only_on="cpu"),
    Variant("compile", "+ compiled encoders", lambda t, d, h, c: _ours(t, d, h, c), keeps_memory=True),
    Variant("triton", "TrainStep with Triton kernels", lambda t, d, h, c: _ours(t, d, h, kernels="triton"),
         only_on="cuda"),
    Variant("graph", "+ one CUDA graph", lambda t, d, h, c: _ours(t, d, h, kernels="triton", graph=True),
         only_on="cuda"),
    Variant("graph-fp16", "the same in float16", lambda t, d, h, c: _ours(t, d, h, kernels="triton", graph=True),
         dtype=torch.float16, only_on="cuda"),
    Variant("compile-graph", "compiled encoders, one CUDA graph",
         lambda t, d, h, c: _ours(t, d, h, c, kernels="triton", graph=True), only_on="cuda"),
)  # fmt: skip


class Runner:
    """A built and warmed-up rung: calling it is one reading, of whole steps for about `seconds`."""

    def __init__(
        self, rung: Variant, task: Task, device: torch.device, dtype: torch.dtype, compile: str, seconds: float
    ) -> None:
        self._task, self._device, self._keeps_memory = task, device, rung.keeps_memory
        dtype = rung.dtype or dtype
        memory = _Memory(device)
        began = time.perf_counter()
        torch.manual_seed(0)
        self._step = rung.build(task, device, dtype, compile)
        views = synthetic_views(
            task, device, dtype if rung.low_precision else torch.float32, channels_last=rung.channels_last
        )
        self._views = itertools.cycle(views)
        # On a GPU the first step chooses kernels, or captures a graph, and the second allocates what they want.
        step_s = seconds_per_call(self.step, 1, device, warm_up=2 if device.type == "cuda" else 0)
        if step_s < _LONG_S:  # else the first tells enough of how many a reading takes
            step_s = seconds_per_call(self.step, 1, device, warm_up=0)
        self.warm_up_s = time.perf_counter() - began
        self.memory = memory.of(self.step)
        self._calls = max(1, round(seconds / step_s))
        self._warm_up = int(step_s < _LONG_S)

    def step(self) -> None:
        keep_freed_memory(self._keeps_memory and self._device.type == "cpu")
        self._step(next(self._views))

    def __call__(self) -> Reading:
        step_s = seconds_per_call(self.step, self._calls, self._device, self._warm_up)
        return {"ms": 1e3 * step_s, "images_per_s": self._task.batch_size / step_s}


def synthetic_views(task: Task, device: torch.device, dtype: torch.dtype, *, channels_last: bool) -> list[Views]:
    """Different batches of normal noise, in the layout and type in which a pipeline delivers them."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape, count = (task.batch_size, 3, task.side, task.side), task.batch_size

    def images() -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype, memory_format=layout)

    return [
        Views(images(), images(), torch.randperm(count, device=device), torch.arange(count, device=device))
        for _ in range(BATCHES)
    ]


class _Memory:
    """What a rung takes, above what was in use when this was made: parameters, state and the peak of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._now()

    def of(self, step: Callable[[], None]) -> Reading:
        now = self._now()  # what warming up left in the caches is given back
        step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            now = device_memory(self._device)
            now["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(self._device)
        else:
            now["peak_resident_bytes"] = peak_resident_bytes()
        return {key: max(0.0, now[key] - self._before[key]) for key in now}

    def _now(self) -> Reading:
        gc.collect()
        if self._device.type != "cuda":
            reset_peak_resident()
            return {"peak_resident_bytes": resident_bytes()}
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        found = device_memory(self._device)
        return found | {"peak_allocated_bytes": found["allocated_bytes"]}


def step_flops(task: Task) -> int:
    """FLOPs of one plain step: every convolution and matrix product, forward and backward, two a multiplication."""
    device = torch.device("meta")
    step = PlainStep(task, device)
    views = synthetic_views(task, device, torch.float32, channels_last=False)[0]
    with FlopCounterMode(display=False) as counter:
        step.loss(views)[0].backward()
    return counter.get_total_flops()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in what runs inside; for compilers, which take what time they like."""
    if seconds is None:
        yield
        return
    if seconds <= 0:
        raise TimeoutError("no time was left for it")

    def stop(*_: object) -> None:
        raise TimeoutError(f"not built within the {seconds:.0f} s that were left")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
