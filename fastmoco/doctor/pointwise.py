"""The fused 1×1 convolution of bottleneck blocks, as `--kernels triton-fused` uses it, against plain PyTorch.

N samples · I input channels · O output channels · H, W sides
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.device import DTYPES, pick_amp
from fastmoco.doctor.compare import ADVICE, verdict, worst
from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.doctor.units import seconds_per_call
from fastmoco.step.kernels import FUSED, fuses_convolutions

_SPLITS, _MOMENTUM, _EPS = 8, 0.1, 1e-5
_KINK = 0.1
_NORM = ("weight", "bias", "running_mean", "running_var")


class Shape(NamedTuple):
    """Of the convolution: N, I, O, and H = W."""

    samples: int
    inputs: int
    outputs: int
    side: int


_THIRD = Shape(64, 64, 256, 56)  # in the first stage of ResNet-50 at 224 px


def pointwise(target: Target) -> Finding:
    """Convolution between two batch norms, with residual and ReLU, in float32 and in the training dtype."""
    device = torch.device(target.device)
    if device.type != "cuda" or not fuses_convolutions(device):
        return Finding(
            status=Status.SKIPPED, text=f"--kernels {FUSED} needs Triton and a GPU of compute capability 8.0 or higher"
        )
    return pointwise_kernel(device, _THIRD, pick_amp("auto", device))


def pointwise_kernel(device: torch.device, shape: Shape, amp: str) -> Finding:
    """The finding for one shape."""
    from fastmoco.model.pointwise import op

    def ours(tensors: dict[str, Tensor]) -> Tensor:
        before, after = (op.Norm(*(tensors[prefix + name] for name in _NORM)) for prefix in ("before_", ""))
        x = op.normalise_later(tensors["x"], before, _SPLITS, _MOMENTUM, _EPS)
        y, _ = op.pointwise(x, tensors["matrix"], after, _SPLITS, _MOMENTUM, _EPS)
        return op.finish(y._replace(residual=tensors["residual"]))

    errors, inputs = [], {}
    for name in dict.fromkeys(("fp32", amp)):
        on_cpu = _inputs(shape, DTYPES[name])
        exact = _forward_backward(_plain, {key: tensor.double() for key, tensor in on_cpu.items()})
        inputs = {key: tensor.to(device) for key, tensor in on_cpu.items()}
        found, plain = (_forward_backward(f, inputs) for f in (ours, _plain))
        errors.append(worst(found, plain, exact, floor=5e-6 if name == "fp32" else 2e-4, dtype=name))
    seconds, plain_s = (seconds_per_call(lambda f=f: _forward_backward(f, inputs), str(device)) for f in (ours, _plain))
    # Forward: x twice, y written and read, residual, output. Backward: of the output five, of y three, and two for each
    # of the products; of x four, and three for the last pass.
    x, y = inputs["x"].numel(), inputs["residual"].numel()
    moved = inputs["x"].element_size() * (9 * x + 14 * y)
    return verdict(
        FUSED,
        max(errors, key=lambda e: e.excess),
        seconds=seconds,
        plain_seconds=plain_s,
        moved_bytes=moved,
        advice=f"{ADVICE}; until then, train with --kernels triton",
    )


def _plain(tensors: dict[str, Tensor], relu: bool = True) -> Tensor:
    """Two batch norms with a convolution between them, each operation one by one."""
    x = F.relu(_batch_norm(tensors["x"], tensors, "before_"))
    y = _batch_norm(F.conv2d(x, tensors["matrix"]), tensors, "") + tensors["residual"]
    return F.relu(y) if relu else y


def _batch_norm(x: Tensor, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    weight, bias, running_mean, running_var = (tensors[prefix + name] for name in _NORM)
    means, variances = running_mean.repeat(_SPLITS, 1), running_var.repeat(_SPLITS, 1)
    groups = [
        F.batch_norm(group, mean, variance, weight, bias, training=True, momentum=_MOMENTUM, eps=_EPS)
        for group, mean, variance in zip(x.chunk(_SPLITS), means, variances, strict=True)
    ]
    running_mean.copy_(means.mean(dim=0))
    running_var.copy_(variances.mean(dim=0))
    return torch.cat(groups)


def _inputs(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the operation, and under `grad` the gradient of its output."""
    generator = torch.Generator().manual_seed(0)

    def images(channels: int) -> Tensor:
        values = torch.randn(shape.samples, channels, shape.side, shape.side, generator=generator)
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    matrix = torch.randn(shape.outputs, shape.inputs, 1, 1, generator=generator) / shape.inputs**0.5
    inputs = {"x": images(shape.inputs), "matrix": matrix.to(dtype), "residual": images(shape.outputs)}
    for prefix, channels in (("before_", shape.inputs), ("", shape.outputs)):
        for name, low in {"weight": 0.5, "bias": -0.5, "running_mean": -0.5, "running_var": 0.5}.items():
            inputs[prefix + name] = low + torch.rand(channels, generator=generator)
    # Where rounding could move an activation across the kink of a ReLU, that is an error as large as the value: of the
    # first one, activations keep a distance, and of the last one, those close to it have no gradient.
    z = _batch_norm(inputs["x"].double(), {name: tensor.double() for name, tensor in inputs.items()}, "before_")
    away = torch.where(z.abs() < _KINK, _KINK * z.sign(), 0.0) / inputs["before_weight"][:, None, None]
    inputs["x"] = (inputs["x"] + away).to(dtype)
    y = _plain({name: tensor.double() for name, tensor in inputs.items()}, relu=False)
    return inputs | {"grad": images(shape.outputs) * (y.abs() > _KINK)}


def _forward_backward(function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, gradients and updated statistics."""
    own = {name: tensor.detach() for name, tensor in inputs.items() if name != "grad"}
    statistics = [name for name in own if "running" in name]
    own |= {name: own[name].clone() for name in statistics}
    leaves = {name: own[name].requires_grad_() for name in own if name not in statistics}
    y = function(own)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["grad"])
    found = {"y": y.detach()} | {name: own[name] for name in statistics}
    return found | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
