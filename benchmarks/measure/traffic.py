"""Lower bounds on the FLOPs and memory traffic of a training step, counted kernel by kernel from the model.

N batch · x, y, w elements of a layer's input, output and weight · e bytes of an activation (2 in 16 bits, 4 in float32)
P parameters · K queue · C embedding

Each kernel is assumed to read its inputs from memory once and to write its outputs once, with no reuse of caches
between kernels. Batch norm includes ReLU and residual, the loss stores no logits, the update is one pass. Less fusion
moves more; activations that fit in a cache move less.

    kernel                  FLOPs                   bytes
    convolution, linear     F = 2·y·w/outputs       forward e(x+y+w); gradient of x e(y+w+x); of w e(x+y+w)
                            each of the three       (none of x for the first layer; the key encoder: forward only)
    weights                 –                       gradients are collected in float32, (e+4)w
    batch norm              –                       forward: statistics ex, then e(x+y), +e·y with a residual
                                                    backward: sums e(y+x), +2e·y with a residual, whose output they
                                                    read and whose gradient they write; then e(y+x+x)
    residual block          –                       the second gradient of its input is read by the sums, ex; after the
                                                    stem their total is written, too, 2ex
    max pooling             –                       part of batch norm, whose y is pooled: one byte for each of y is
                                                    written once and read twice, but not by the key encoder
    average pooling         –                       e(x+y), the same backward
    with fused 1×1 convolutions, in a bottleneck, what differs from the above:
    conv3                   –                       gradient of x e(y+w+x+x): with the sums of bn2
    conv1 after a block     –                       forward e(x+x+x+y+w): it applies that block's bn3
                                                    gradient of x e(y+w+x+x+x): with the sums of that bn3
    bn1, bn3                –                       forward: ex less, their statistics are summed where x is computed
    bn2, bn3 before conv1   –                       forward: their output ex+ey (and its residual) less
                                                    backward: e(y+x+x), without the sums
    loss                    2NKC + 2NC              4KC and e·NC per pass: forward, and the gradient of the queries
    update                  –                       gradients read twice, momentum buffer, query and key read and
                                                    written, the last two in 16 bits too: 8·4P, + 4P where e is 2
    queue                   –                       2·4NC
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from benchmarks.measure.plain import Task
from fastmoco.model.batchnorm.split import SplitBatchNorm2d
from fastmoco.model.encoder import Encoder, build_encoder

FLOAT = 4  # bytes of a parameter, a gradient and a key


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step: its group, a description, its FLOPs and the bytes it moves."""

    group: str
    description: str
    flops: float
    bytes: float


def count_step(task: Task, element_bytes: int, *, fused: bool = False) -> list[Kernel]:
    """All kernels of one asymmetric step, with activations of `element_bytes`.

    fused  with the 1×1 convolutions of bottlenecks as `--kernels triton-fused` computes them
    """
    encoder = build_encoder(task.arch, stem=task.stem, dim=task.dim, bn_splits=task.bn_splits).to("meta").train()
    kernels: list[Kernel] = []
    for name, module, x, y, residual in _calls(encoder, task):
        fusion = _fusion_of(encoder, name) if fused else _Fusion()
        kernels += _layer_kernels(name, module, x, y, residual, element_bytes, fusion)
    n, keys = task.batch_size * task.dim, task.queue * task.dim
    for direction in ("forward", "gradient of the queries"):
        flops = 2 * task.batch_size * keys + 2 * n
        kernels.append(Kernel("loss", direction, flops, FLOAT * keys + element_bytes * n))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    rounded = 2 * element_bytes if element_bytes < FLOAT else 0
    kernels.append(Kernel("update", "SGD and EMA in one pass", 0, (8 * FLOAT + rounded) * parameters))
    kernels.append(Kernel("queue", "enqueue", 0, 2 * FLOAT * n))
    return kernels


class _Fusion(NamedTuple):
    """What a layer of a bottleneck leaves to a product, or a product does for batch norms; see the table above.

    measured, applied   a batch norm: its statistics, its output and the sums of its gradients are made by a product
    forward, gradient   a product: further passes over x, forward and in the gradient of x
    """

    measured: bool = False
    applied: bool = False
    forward: int = 0
    gradient: int = 0


def _fusion_of(encoder: Encoder, name: str) -> _Fusion:
    block, _, layer = name.rpartition(".")
    if not isinstance(encoder.get_submodule(block), resnet.Bottleneck):
        return _Fusion()
    stage, _, index = block.rpartition(".")
    is_first, is_last = index == "0", int(index) == len(list(encoder.get_submodule(stage).children())) - 1
    return {
        "conv1": _Fusion() if is_first else _Fusion(forward=2, gradient=2),
        "bn1": _Fusion(measured=True),
        "bn2": _Fusion(applied=True),
        "conv3": _Fusion(gradient=1),
        "bn3": _Fusion(measured=True, applied=not is_last),
    }.get(layer, _Fusion())


def _calls(encoder: Encoder, task: Task) -> list[tuple[str, nn.Module, Tensor, Tensor, bool]]:
    """Layers in the order of the forward pass: name, module, input, output, whether a residual is added."""
    calls: list[tuple[str, nn.Module, Tensor, Tensor, bool]] = []
    counted = (nn.Conv2d, nn.Linear, SplitBatchNorm2d, nn.AdaptiveAvgPool2d, resnet.BasicBlock)

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
            x, y = (value[0] if isinstance(value, tuple) else value for value in (inputs[0], output))
            calls.append((name, module, x, y, named.get("residual") is not None))

        return hook

    for name, module in encoder.named_modules():
        if isinstance(module, (*counted, resnet.Bottleneck)):
            module.register_forward_hook(recorder(name), with_kwargs=True)
    with torch.no_grad():
        encoder(torch.empty(task.batch_size, 3, task.side, task.side, device="meta"))
    return calls


def _layer_kernels(
    name: str, module: nn.Module, x: Tensor, y: Tensor, residual: bool, element_bytes: int, fusion: _Fusion
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
        passes = {"query forward": fusion.forward, "key forward": fusion.forward, "gradient of the weight": 0}
        if x.shape[1] != 3:  # the views need no gradient
            passes["gradient of the input"] = fusion.gradient
        for direction, further in passes.items():
            yield Kernel(group, direction, flops, (1 + further) * nx + ny + e * w)
        yield Kernel("weights", "gradients in float32", 0, (e + FLOAT) * w)
    elif isinstance(module, SplitBatchNorm2d):
        group, residual_bytes = f"{stage}, batch norm", ny if residual else 0
        taps = y.numel() if y.shape != x.shape else 0  # of the pooling
        statistics = 0 if fusion.measured else nx
        normalisation, sums = (0 if fusion.applied else nx + ny + count * residual_bytes for count in (1, 2))
        yield Kernel(group, "query forward", 0, statistics + normalisation + taps)
        yield Kernel(group, "key forward", 0, statistics + normalisation)
        yield Kernel(group, "backward", 0, sums + ny + 2 * nx + 2 * taps)
    elif isinstance(module, nn.AdaptiveAvgPool2d):
        for direction in ("query forward", "key forward", "backward"):
            yield Kernel(f"{stage}, pooling", direction, 0, nx + ny)
    else:
        passes = 2 if name == "backbone.layer1.0" else 1
        yield Kernel(f"{stage}, batch norm", "sum of the gradients of a block's input", 0, passes * nx)


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
