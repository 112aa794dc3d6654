"""The training step of each mode, eager and as a CUDA graph: its launches, waits, copies and graph nodes.

    python -m tests.standin.run step [--add host-wait|host-copy|launch]... MODE...

A mode is a recipe with other settings, built as `fastmoco train` builds it. Shapes are the recipe's. With --add, there
is a report of every fault, named MODE+FAULT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from fastmoco.config import ResolvedConfig
from fastmoco.device import DTYPES, make_deterministic
from fastmoco.distributed.world import World
from fastmoco.recipes import recipe
from fastmoco.run.state import build_train_step
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views
from tests.standin import compiler, operators, runtime
from tests.standin.runtime import CallLog, Calls, texts

CIFAR, IMAGENET = "cifar10-demo", "imagenet-v2"
SETTINGS: dict[str, Any] = {
    **{"knn_every": 0, "workers": 0, "amp": "bf16", "kernels": "triton", "compile": "off"},
    "stem_format": "channels-last",
}
TIED: dict[str, Any] = {"moco_m": 0.0}  # there is no momentum encoder
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar": (CIFAR, {}),
    "fp32": (CIFAR, {"amp": "fp32"}),
    "fp16": (CIFAR, {"amp": "fp16"}),
    "torch": (CIFAR, {"kernels": "torch"}),
    "torch-fp32": (CIFAR, {"kernels": "torch", "amp": "fp32"}),
    "torch-fp16": (CIFAR, {"kernels": "torch", "amp": "fp16"}),
    "one-group": (CIFAR, {"bn_splits": 1}),
    "torch-one-group": (CIFAR, {"kernels": "torch", "bn_splits": 1}),
    "symmetric": (CIFAR, {"symmetric": True}),
    "end-to-end": (CIFAR, {"mechanism": "end-to-end", "moco_k": 512, **TIED}),
    "memory-bank": (CIFAR, {"mechanism": "memory-bank", **TIED}),
    "checkpointed": (CIFAR, {"checkpoint_activations": True}),
    "half-gradients": (CIFAR, {"grad_comm": "bf16"}),
    "contiguous-stem": (CIFAR, {"stem_format": "contiguous"}),
    "deterministic": (CIFAR, {"deterministic": True}),
    "torch-deterministic": (CIFAR, {"deterministic": True, "kernels": "torch"}),
    "compiled": (CIFAR, {"compile": "default"}),
    "compiled-torch": (CIFAR, {"compile": "default", "kernels": "torch", "bn_splits": 1}),
    "compiled-symmetric": (CIFAR, {"compile": "default", "symmetric": True}),
    "compiled-contiguous-stem": (CIFAR, {"compile": "default", "stem_format": "contiguous"}),
    "imagenet-compiled": (IMAGENET, {"compile": "default"}),
    "imagenet": (IMAGENET, {}),
    "imagenet-fp16": (IMAGENET, {"amp": "fp16"}),
    "imagenet-fused": (IMAGENET, {"kernels": "triton-fused"}),
    "imagenet-torch": (IMAGENET, {"kernels": "torch"}),
    "imagenet-checkpointed": (IMAGENET, {"checkpoint_activations": True}),
}
WARM_UP = 2
LR, EMA_MOMENTUM = 0.03, 0.99


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--add", choices=FAULTS, action="append", default=[])
    parser.add_argument("modes", nargs="+", choices=MODES)
    options = parser.parse_args()
    operators.install()
    compiler.install()
    reports: dict[str, Any] = {}
    for mode in options.modes:
        for fault in options.add:
            with added(FAULTS[fault]):
                reports[f"{mode}+{fault}"] = report(mode)
        if not options.add:
            reports[mode] = report(mode)
    print(json.dumps(reports))


def report(mode: str) -> dict[str, Any]:
    """What `eager` and `graph` find of a mode."""
    with determinism(MODES[mode][1].get("deterministic", False)):
        step, views = build(mode)
        return attempt(eager, step, views) | attempt(graph, step, views)


def build(mode: str, **changes: Any) -> tuple[TrainStep, Views]:
    """The training step of a mode, with some settings changed, and a batch of its shape."""
    name, settings = MODES[mode]
    config = ResolvedConfig.of(recipe(name).replace(**SETTINGS | settings | changes))
    device, images = torch.device("cuda", 0), 4 * config.optim.batch_size
    return build_train_step(config, World(device), images), example(config, device)


def attempt(measure: Callable[[TrainStep, Views], dict[str, Any]], step: TrainStep, views: Views) -> dict[str, Any]:
    """What it finds; or its error, and whether torch is left in its usual stream, in which nothing is captured."""
    try:
        return measure(step, views)
    except Exception:
        default = torch.cuda.current_stream() == torch.cuda.default_stream()
        usual = default and not torch.cuda.is_current_stream_capturing()
        return {measure.__name__: {"error": traceback.format_exc(), "in_default_stream": usual}}


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    torch.backends.cudnn.benchmark = not wanted
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    if wanted:
        make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore[reportAttributeAccessIssue]


def eager(step: TrainStep, views: Views) -> dict[str, Any]:
    """The third step, and the reading of its metrics."""
    for _ in range(WARM_UP):
        step(views, LR, EMA_MOMENTUM)
    with CallLog() as log:
        step(views, LR, EMA_MOMENTUM)
    with CallLog() as reading:
        step.read_metrics()
    return {"eager": summary(log), "reading": summary(reading)}


def graph(step: TrainStep, views: Views) -> dict[str, Any]:
    """The capture, and the second replay."""
    before = runtime.violations()
    with CallLog() as log:
        graphed = GraphedStep(step, views)
    capture = {
        "nodes": runtime.graph_nodes(),
        "violations": runtime.violations() - before,
        "host_copies": texts(log.named("captured host copy")),
        "outside": texts(log.named("outside capture")),
    }
    graphed(views, LR, EMA_MOMENTUM)
    with CallLog() as replay:
        graphed(views, LR, EMA_MOMENTUM)
    return {"graph": capture, "replay": summary(replay) | {"graphs": len(replay.named("cudaGraphLaunch"))}}


def summary(calls: Calls) -> dict[str, Any]:
    """Launches and device copies as numbers; what could hold up the device or the host as texts."""
    return {
        "launches": len(calls.kernels()),
        "device_copies": len(calls.device_copies()),
        "waits": texts(calls.host_waits()),
        "host_copies": texts(calls.host_copies()),
        "allocations": texts(calls.allocations()),
        "streams": len({call.stream for call in calls.kernels()}),
    }


def example(config: ResolvedConfig, device: torch.device) -> Views:
    """A batch as a pipeline delivers it."""
    batch, side = config.optim.batch_size, config.augment.crop_size

    def view() -> Tensor:
        shape = (batch, 3, side, side)
        return torch.empty(shape, device=device, dtype=DTYPES[config.run.amp], memory_format=torch.channels_last)

    return Views(view(), view(), torch.randperm(batch, device=device), torch.arange(batch, device=device))


@contextlib.contextmanager
def added(fault: Callable[[TrainStep], object]) -> Iterator[None]:
    """Let every step end with it."""
    original = TrainStep.run

    def run(self: TrainStep, views: Views) -> None:
        original(self, views)
        fault(self)

    TrainStep.run = run
    yield
    TrainStep.run = original


def _host_copy(step: TrainStep) -> None:
    step.lr.copy_(torch.zeros((), dtype=step.lr.dtype).pin_memory(), non_blocking=True)


FAULTS: dict[str, Callable[[TrainStep], object]] = {
    "host-wait": lambda step: step.lr.item(),
    "host-copy": _host_copy,
    "launch": lambda step: step.lr.add_(0.0),
}


if __name__ == "__main__":
    main()
