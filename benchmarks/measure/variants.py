"""The variants of an ablation from the plain training step to ours, and how one is built, warmed up and measured.

To add a variant, add an entry to VARIANTS.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure.harness import Reading, seconds_per_call
from benchmarks.measure.plain import PlainStep, Task
from benchmarks.measure.resources import device_memory, growth, peak_resident_bytes, release_caches, resident_bytes
from fastmoco.distributed.world import World
from fastmoco.model.encoder import build_encoder
from fastmoco.model.key_queue import KeyQueue
from fastmoco.model.moco import MoCo
from fastmoco.model.resnet import has_bottlenecks
from fastmoco.model.winograd import use_winograd, winograd_is_used
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.step.cuda_graph import CudaGraph, GraphedStep
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views

Step = Callable[[Views], object]
CONFIGS = {
    "cifar": Task(arch="resnet18", stem="cifar", side=32, batch_size=512, queue=4096, bn_splits=8),
    "r50": Task(
        arch="resnet50", stem="imagenet", side=224, batch_size=256, queue=65536, bn_splits=8, ema_momentum=0.999
    ),
}
BATCHES = 4  # different ones, so that no step finds its input in a cache
_SLOW_STEP_S = 2.0  # such a step is not warmed up before each reading


@dataclass(frozen=True)
class Variant:
    """One variant of the step; `build` takes the task, the device, the dtype to train in and the compile mode.

    low_precision  whether it trains in the ablation's dtype, which is float32 where the device has nothing faster
    missing        why its change does not exist on a device that trains in a dtype, or None if it does
    dtype          another 16-bit dtype than the ablation's
    keeps_memory   whether malloc keeps freed memory (`fastmoco.run.malloc`), as in `fastmoco train` on a CPU
    only_on        "cuda" or "cpu", if the change exists on one of them only
    bottlenecks    whether the change exists in backbones with bottleneck blocks only
    """

    name: str
    change: str
    build: Callable[[Task, torch.device, torch.dtype, str], Step]
    channels_last: bool = True
    low_precision: bool = True
    missing: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None
    dtype: torch.dtype | None = None
    keeps_memory: bool = False
    only_on: str | None = None
    bottlenecks: bool = False

    def exists(self, task: Task, device: torch.device) -> bool:
        """Whether the change exists for this task on this device."""
        return self.only_on in (None, device.type) and (has_bottlenecks(task.arch) or not self.bottlenecks)


def train_step(task: Task, world: World, dtype: torch.dtype, **options: Any) -> TrainStep[KeyQueue]:
    """TrainStep with the recipes' settings on the world's device; the task covers all ranks."""
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
    winograd: bool = True,
) -> Step:
    """`train_step` on one rank; a CUDA graph is captured at the first batch."""
    step = train_step(task, World(device), dtype, compile=compile, kernels=kernels)
    use_winograd(step.model, winograd)
    if graph:
        return _Graphed(step, task)
    return lambda views: step(views, task.lr, task.ema_momentum)


class _MeasuredGraph(CudaGraph):
    """Notes the peak of torch's allocator during the capture.

    A replay allocates nothing: what it uses is the graph's own pool, which no other tensor can have, and which the
    allocator counts as allocated only while the capture fills it.
    """

    peak_allocated_bytes = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._of = device

    def capture(self, run: Callable[[], None]) -> None:
        torch.cuda.reset_peak_memory_stats(self._of)
        super().capture(run)
        self.peak_allocated_bytes = torch.cuda.max_memory_allocated(self._of)


class _Graphed:
    """A step that is captured as a CUDA graph at its first batch; `peak_allocated_bytes` is that of the capture."""

    peak_allocated_bytes = 0

    def __init__(self, step: TrainStep[KeyQueue], task: Task) -> None:
        self._step, self._task, self._captured = step, task, None

    def __call__(self, views: Views) -> None:
        if self._captured is None:
            graph = _MeasuredGraph(self._step.device)
            self._captured = GraphedStep(self._step, views, graph)
            self.peak_allocated_bytes = graph.peak_allocated_bytes
        self._captured(views, self._task.lr, self._task.ema_momentum)


def _plain(task: Task, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> Step:
    """`PlainStep` with our encoder, channels-last, and torch's own convolutions."""
    step = PlainStep(task, device, channels_last=True, dtype=dtype, **options)
    for encoder in (step.query, step.key):
        use_winograd(encoder, False)
    return step


def _no_16_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    return "this processor has no 16-bit matrix products: it trains in fp32" if dtype == torch.float32 else None


def _no_winograd(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if winograd_is_used(device, dtype) else "used in fp32 on a processor with AVX2, without AVX-512"


VARIANTS = (
    Variant("plain", "eager, fp32, NCHW", lambda t, d, h, c: PlainStep(t, d), channels_last=False, low_precision=False),
    Variant("channels-last", "+ channels-last, our split BN", lambda t, d, h, c: _plain(t, d),
         low_precision=False),
    Variant("amp", "+ 16-bit autocast", lambda t, d, h, c: _plain(t, d, h), missing=_no_16_bits),
    Variant("one-pass", "+ SGD and EMA in one pass", lambda t, d, h, c: _plain(t, d, h, one_pass=True)),
    Variant("trainstep", "+ no stored logits, no host read", lambda t, d, h, c: _ours(t, d, h, winograd=False)),
    Variant("winograd", "+ Winograd's convolutions", lambda t, d, h, c: _ours(t, d, h), missing=_no_winograd,
         only_on="cpu"),
    Variant("kept-memory", "+ freed memory kept", lambda t, d, h, c: _ours(t, d, h), keeps_memory=True, only_on="cpu"),
    Variant("compile", "+ compiled encoders", lambda t, d, h, c: _ours(t, d, h, c), keeps_memory=True),
    Variant("triton", "TrainStep with Triton kernels", lambda t, d, h, c: _ours(t, d, h, kernels="triton"),
         only_on="cuda"),
    Variant("graph", "+ one CUDA graph", lambda t, d, h, c: _ours(t, d, h, kernels="triton", graph=True),
         only_on="cuda"),
    Variant("graph-fp16", "the same in float16", lambda t, d, h, c: _ours(t, d, h, kernels="triton", graph=True),
         dtype=torch.float16, only_on="cuda"),
    Variant("graph-fused", "one CUDA graph, 1×1 convolutions fused with batch norm",
         lambda t, d, h, c: _ours(t, d, h, kernels="triton-fused", graph=True), only_on="cuda", bottlenecks=True),
    Variant("compile-graph", "compiled encoders and Triton kernels, one CUDA graph",
         lambda t, d, h, c: _ours(t, d, h, c, kernels="triton", graph=True), only_on="cuda"),
)  # fmt: skip


class Runner:
    """A variant, built and warmed up. Each call is one reading, of as many whole steps as fit `seconds`."""

    def __init__(
        self, variant: Variant, task: Task, device: torch.device, dtype: torch.dtype, compile: str, seconds: float
    ) -> None:
        self._task, self._device, self._keeps_memory = task, device, variant.keeps_memory
        dtype = variant.dtype or dtype
        self.dtype = dtype if variant.low_precision else torch.float32
        before = _idle_memory(device)
        began = time.perf_counter()
        torch.manual_seed(0)
        self._step = variant.build(task, device, dtype, compile)
        views = synthetic_views(task, device, self.dtype, channels_last=variant.channels_last)
        self._views = itertools.cycle(views)
        # On a GPU the first step selects kernels, or captures a graph, and the second allocates their workspace.
        step_s = seconds_per_call(self.step, 1, device, warm_up=2 if device.type == "cuda" else 0)
        if step_s < _SLOW_STEP_S:  # otherwise the first is accurate enough to choose the number of steps
            step_s = seconds_per_call(self.step, 1, device, warm_up=0)
        self.warm_up_s = time.perf_counter() - began
        self.memory = growth(before, self._peak_memory())
        self._calls = max(1, round(seconds / step_s))
        self._warm_up = int(step_s < _SLOW_STEP_S)

    def step(self) -> None:
        keep_freed_memory(self._keeps_memory and self._device.type == "cpu")
        self._step(next(self._views))

    def __call__(self) -> Reading:
        step_s = seconds_per_call(self.step, self._calls, self._device, self._warm_up)
        return {"ms": 1e3 * step_s, "images_per_s": self._task.batch_size / step_s}

    def _peak_memory(self) -> Reading:
        """Parameters, state and the peak of one step, without what warming up has cached.

        A graph's step has its peak in the capture, and its pool is part of `reserved_bytes` and `nvml_bytes`.
        """
        _idle_memory(self._device)
        self.step()
        if self._device.type != "cuda":
            return {"peak_resident_bytes": peak_resident_bytes()}
        torch.cuda.synchronize(self._device)
        in_capture = getattr(self._step, "peak_allocated_bytes", 0)
        peak = max(torch.cuda.max_memory_allocated(self._device), in_capture)
        return device_memory(self._device) | {"peak_allocated_bytes": peak}


def _idle_memory(device: torch.device) -> Reading:
    """Memory in use after caches are released."""
    release_caches(device)
    if device.type != "cuda":
        return {"peak_resident_bytes": resident_bytes()}
    memory = device_memory(device)
    return memory | {"peak_allocated_bytes": memory["allocated_bytes"]}


def shrunk(task: Task) -> Task:
    """A tiny task for --quick, with the stem of the original."""
    side = 16 if task.stem == "cifar" else 96
    return replace(task, arch="resnet18", side=side, batch_size=8, queue=64, bn_splits=2)


def synthetic_views(task: Task, device: torch.device, dtype: torch.dtype, *, channels_last: bool) -> list[Views]:
    """Different batches of normal noise, in the layout and dtype that a pipeline delivers."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape, count = (task.batch_size, 3, task.side, task.side), task.batch_size

    def images() -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype, memory_format=layout)

    return [
        Views(images(), images(), torch.randperm(count, device=device), torch.arange(count, device=device))
        for _ in range(BATCHES)
    ]


def step_flops(task: Task) -> int:
    """FLOPs of one plain step: all convolutions and matrix products, forward and backward, two per multiply-add."""
    device = torch.device("meta")
    step = PlainStep(task, device)
    views = synthetic_views(task, device, torch.float32, channels_last=False)[0]
    with FlopCounterMode(display=False) as counter:
        step.loss(views)[0].backward()
    return counter.get_total_flops()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError in the block when the time is over; for compilers, which have no limit of their own."""
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
