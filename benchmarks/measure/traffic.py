"""Lower bounds on the FLOPs and memory traffic of a training step, counted kernel by kernel from the model.

N batch · x, y, w elements of a layer's input, output and weight · e bytes of an activation (2 in 16 bits, 4 in float32)
P parameters · K queue · C embedding

Each kernel is assumed to read its inputs from memory once and to write its outputs once, with no reuse of caches
between kernels. Batch norm includes ReLU and residual, the loss stores no logits, the update is one pass. Less fusion
moves more; activations that fit in a cache move less.

    kernel                  FLOPs                   bytes
    convolution, linear     F = 2·y·w/outputs       forward e(x+y+w); gradient of x e(y+w+x); of w e(x+y+w)
                            each of the three       (none of x for the first layer; the key encoder: forward only)
    weights                 –                       a cast to 16 bits (4+e)w per forward and (e+4)w back; gradients are
                                                    added to a zeroed buffer, 12w
    batch norm              –                       forward: statistics ex, then e(x+y), +e·y with a residual
                                                    backward: sums e(y+x), then e(y+x+x), +e·y with a residual
    residual block          –                       the sum of the two gradients of its input 3ex
    max pooling             –                       e(x+y) and an 8-byte index per value of y; the same backward
    average pooling         –                       e(x+y), the same backward
    loss                    2NKC + 2NC              4KC and e·NC per pass: forward, and the gradient of the queries
    update                  –                       gradients read twice and zeroed, momentum buffer, query and key
                                                    read and written: 9·4P
    queue                   –                       2·4NC
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from benchmarks.measure.plain import Task
from fastmoco.model.batchnorm.split import SplitBatchNorm2d
from fastmoco.model.encoder import Encoder, build_encoder

FLOAT = 4  # bytes of a parameter, a gradient and a key
INDEX = 8  # bytes of an index of max pooling


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step: its group, a description, its FLOPs and the bytes it moves."""

    group: str
    description: str
    flops: float
    bytes: float


def count_step(task: Task, element_bytes: int) -> list[Kernel]:
    """All kernels of one asymmetric step, with activations of `element_bytes`."""
    encoder = build_encoder(task.arch, stem=task.stem, dim=task.dim, bn_splits=task.bn_splits).to("meta").train()
    kernels: list[Kernel] = []
    for name, module, x, y, residual in _calls(encoder, task):
        kernels += _layer_kernels(name, module, x, y, residual, element_bytes)
    n, keys = task.batch_size * task.dim, task.queue * task.dim
    for direction in ("forward", "gradient of the queries"):
        flops = 2 * task.batch_size * keys + 2 * n
        kernels.append(Kernel("loss", direction, flops, FLOAT * keys + element_bytes * n))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    kernels.append(Kernel("update", "SGD and EMA in one pass", 0, 9 * FLOAT * parameters))
    kernels.append(Kernel("queue", "enqueue", 0, 2 * FLOAT * n))
    return kernels


def _calls(encoder: Encoder, task: Task) -> list[tuple[str, nn.Module, Tensor, Tensor, bool]]:
    """Layers in the order of the forward pass: name, module, input, output, whether a residual is added."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor, bool]] = []
    counted = (nn.Conv2d, nn.Linear, SplitBatchNorm2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, resnet.BasicBlock)

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: dict[str, Any], output: Tensor) -> None:
            calls.append((name, module, inputs[0], output, named.get("residual") is not None))

        return hook

    for name, module in encoder.named_modules():
        if isinstance(module, (*counted, resnet.Bottleneck)):
            module.register_forward_hook(recorder(name), with_kwargs=True)
    with torch.no_grad():
        encoder(torch.empty(task.batch_size, 3, task.side, task.side, device="meta"))
    return calls


def _layer_kernels(
    name: str, module: nn.Module, x: Tensor, y: Tensor, residual: bool, element_bytes: int
) -> Iterator[Kernel]:
    """Kernels of a layer: query forward and backward, key forward."""
    e, stage = element_bytes, _stage(name)
    nx, ny = e * x.numel(), e * y.numel()
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        w = module.weight.numel()
        flops = 2.0 * y.numel() * w / module.weight.shape[0]
        group = stage
        if isinstance(module, nn.Conv2d):
            group += f", {module.kernel_size[0]}×{module.kernel_size[1]} convolutions"
        passes = ["query forward", "key forward", "gradient of the weight"]
        if x.shape[1] != 3:  # the views need no gradient
            passes.append("gradient of the input")
        for direction in passes:
            yield Kernel(group, direction, flops, nx + ny + e * w)
        cast = (FLOAT + e) * w if e < FLOAT else 0
        yield Kernel("weights", "casts and sums of gradients", 0, 3 * cast + 3 * FLOAT * w)
    elif isinstance(module, SplitBatchNorm2d):
        group, residual_bytes = f"{stage}, batch norm", ny if residual else 0
        for direction in ("query forward", "key forward"):
            yield Kernel(group, direction, 0, 2 * nx + ny + residual_bytes)
        yield Kernel(group, "backward", 0, 2 * ny + 3 * nx + residual_bytes)
    elif isinstance(module, nn.MaxPool2d):
        for direction in ("query forward", "key forward", "backward"):
            yield Kernel(f"{stage}, pooling", direction, 0, nx + ny + INDEX * y.numel())
    elif isinstance(module, nn.AdaptiveAvgPool2d):
        for direction in ("query forward", "key forward", "backward"):
            yield Kernel(f"{stage}, pooling", direction, 0, nx + ny)
    else:
        yield Kernel(f"{stage}, batch norm", "sum of the gradients of a block's input", 0, 3 * nx)


def _stage(name: str) -> str:
    """`backbone.layer3.0.conv1` → `stage 3`."""
    parts = name.removeprefix("backbone.").split(".")
    if parts[0].startswith("layer"):
        return f"stage {parts[0].removeprefix('layer')}"
    return "head" if parts[0] in ("head", "avgpool") else "stem"


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of a machine: FLOP/s of a matrix product in one number format, and bytes/s of a copy."""

    flop_per_s: float
    bytes_per_s: float

    @property
    def ridge(self) -> float:
        """Arithmetic intensity, in FLOP/byte, above which a kernel is limited by arithmetic."""
        return self.flop_per_s / self.bytes_per_s

    def seconds(self, kernel: Kernel) -> float:
        """Minimum time of a kernel: that of its arithmetic or of its memory traffic, whichever is longer."""
        return max(kernel.flops / self.flop_per_s, kernel.bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Group:
    """Kernels under two ceilings. `compute_share` is the share of the minimum time in kernels limited by arithmetic."""

    flops: float
    bytes: float
    seconds: float
    compute_share: float

    @property
    def intensity(self) -> float:
        """FLOP/byte."""
        return self.flops / self.bytes

    @property
    def bound(self) -> str:
        """The ceiling that limits most of the minimum time."""
        return "arithmetic" if self.compute_share > 0.5 else "memory"


def group_of(kernels: list[Kernel], ceilings: Ceilings) -> Group:
    """Totals of kernels that run one after the other."""
    seconds = math.fsum(map(ceilings.seconds, kernels))
    computing = [k for k in kernels if k.flops / ceilings.flop_per_s > k.bytes / ceilings.bytes_per_s]
    share = math.fsum(map(ceilings.seconds, computing)) / seconds
    return Group(sum(k.flops for k in kernels), sum(k.bytes for k in kernels), seconds, share)


def groups_of(kernels: list[Kernel], ceilings: Ceilings) -> dict[str, Group]:
    """All groups, in the order of the forward pass."""
    names = dict.fromkeys(kernel.group for kernel in kernels)
    return {name: group_of([k for k in kernels if k.group == name], ceilings) for name in names}
