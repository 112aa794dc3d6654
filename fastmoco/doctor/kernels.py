"""Batch norm, InfoNCE and update as training uses them on this device, against plain PyTorch.

On a GPU with Triton these are its kernels, elsewhere the implementations in torch.

N samples · C channels · H, W sides · K queue · P parameters
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastmoco.device import DTYPES, pick_amp
from fastmoco.doctor.compare import ADVICE, Errors, verdict, worst
from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.doctor.units import seconds_per_call
from fastmoco.model.batchnorm.split import SplitBatchNorm2d
from fastmoco.model.dictionaries import ContrastBatch
from fastmoco.step.flat_params import FlatParameters
from fastmoco.step.info_nce import InfoNCE
from fastmoco.step.kernels import check_kernels
from fastmoco.step.sgd_ema import MomentumUpdate
from pipelines.errors import BackendMissingError

USE_TORCH = f"{ADVICE}; until then, train with --kernels torch"
BRINGS = "fused batch norm, InfoNCE, update and augmentation: fewer passes over memory, and less of it"
_SPLITS, _TEMPERATURE = 8, 0.1
_KINK = 0.1
_SGD_MOMENTUM, _WEIGHT_DECAY, _LR, _EMA = 0.9, 5e-4, 0.06, 0.99

# Real shapes on a GPU: a stage of CIFAR ResNet-18, the queue of ImageNet, the parameters of ResNet-18. Small on a CPU.
_SHAPE = {"cuda": (256, 64, 32, 32), "cpu": (32, 64, 16, 16)}
_QUEUE = {"cuda": (256, 65_536), "cpu": (64, 4096)}
_PARAMETERS = {"cuda": 11_200_000, "cpu": 1_000_000}


def triton(target: Target) -> Finding:
    """Whether Triton is there, and compiles and runs a kernel on the device."""
    device = torch.device(target.device)
    if device.type != "cuda":
        return Finding(status=Status.SKIPPED, text="needs a GPU; on a CPU torch's implementations, below, are used")
    try:
        check_kernels("triton", device)
    except BackendMissingError as error:
        return Finding(status=Status.MISSING, text=str(error), advice=f"{BRINGS}: pip install triton")
    from triton import __version__

    update_kernel("triton", device, parameters=64)
    return Finding(text=f"Triton {__version__} compiles and runs", figures={"version": __version__})


def implementation(device: torch.device) -> str:
    """`triton` where training would use it, else `torch`."""
    if device.type != "cuda":
        return "torch"
    try:
        check_kernels("triton", device)
    except BackendMissingError:
        return "torch"
    return "triton"


def batch_norm(target: Target) -> Finding:
    """Split batch norm with residual and ReLU, forward and backward, in float32 and in the training dtype."""
    device = torch.device(target.device)
    return batch_norm_kernel(implementation(device), device, _SHAPE[device.type], pick_amp("auto", device))


def batch_norm_kernel(kernels: str, device: torch.device, shape: tuple[int, int, int, int], amp: str) -> Finding:
    """shape (N, C, H, W)."""
    layer = SplitBatchNorm2d(shape[1], _SPLITS)
    layer.kernels = kernels

    def ours(x: Tensor, residual: Tensor, **statistics: Tensor) -> Tensor:
        return functional_call(layer, statistics, (x, True, residual))

    inputs, errors, timed = {}, [], {}
    for name in dict.fromkeys(("fp32", amp)):
        on_cpu = _activations(shape, DTYPES[name])
        exact = _forward_backward(plain_batch_norm, {key: tensor.double() for key, tensor in on_cpu.items()})
        inputs = {key: tensor.to(device) for key, tensor in on_cpu.items()}
        found, plain = (_forward_backward(f, inputs) for f in (ours, plain_batch_norm))
        errors.append(worst(found, plain, exact, floor=5e-6 if name == "fp32" else 2e-4, dtype=name))
        for f in (ours, plain_batch_norm):
            timed[f] = seconds_per_call(lambda f=f, inputs=inputs: _forward_backward(f, inputs), str(device))
    # Forward: x twice, residual and y. Backward: x twice, y, dy, the gradient before the ReLU twice, and dx.
    moved = 11 * inputs["x"].numel() * inputs["x"].element_size()
    most = max(errors, key=lambda e: e.excess)
    return _verdict(kernels, most, timed[ours], timed[plain_batch_norm], moved)


def plain_batch_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    relu: bool = True,
) -> Tensor:
    """`F.batch_norm` of each group of samples, sum and ReLU: what `SplitBatchNorm2d` documents."""
    means, variances = running_mean.repeat(_SPLITS, 1), running_var.repeat(_SPLITS, 1)
    groups = [
        F.batch_norm(group, mean, variance, weight, bias, training=True)
        for group, mean, variance in zip(x.chunk(_SPLITS), means, variances, strict=True)
    ]
    running_mean.copy_(means.mean(dim=0))
    running_var.copy_(variances.mean(dim=0))
    y = torch.cat(groups) + residual
    return F.relu(y) if relu else y


def _activations(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of a batch norm, and under `grad` the gradient of its output. Channels-last, each channel with a mean."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]

    def images(spread: float | Tensor = 1.0, mean: float | Tensor = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * spread + mean
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    def of_channels(low: float) -> Tensor:
        return low + torch.rand(channels, generator=generator)

    inputs = {"x": images(of_channels(0.5)[:, None, None], of_channels(0.0)[:, None, None]), "residual": images()}
    for name, low in {"weight": 0.5, "bias": -0.5, "running_mean": -0.5, "running_var": 0.5}.items():
        inputs[name] = of_channels(low)
    # No gradient where rounding could move an activation across the kink of the ReLU, an error as large as the value.
    y = plain_batch_norm(**{name: tensor.double() for name, tensor in inputs.items()}, relu=False)
    return inputs | {"grad": images() * (y.abs() > _KINK)}


def _forward_backward(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, gradients and updated statistics of a batch norm."""
    own = {name: tensor.detach() for name, tensor in inputs.items() if name != "grad"}
    for name in ("running_mean", "running_var"):
        own[name] = own[name].clone()
    leaves = {name: own[name].requires_grad_() for name in ("x", "residual", "weight", "bias")}
    y = function(**own)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["grad"])
    found = {"y": y.detach(), "running_mean": own["running_mean"], "running_var": own["running_var"]}
    return found | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def info_nce(target: Target) -> Finding:
    """The loss and its gradient, in float32 as in training."""
    device = torch.device(target.device)
    return info_nce_kernel(implementation(device), device, *_QUEUE[device.type])


def info_nce_kernel(kernels: str, device: torch.device, queries: int, queue: int, channels: int = 128) -> Finding:
    """`queries` N, `queue` K and `channels` C."""
    generator = torch.Generator().manual_seed(0)
    q, noise, negatives = (
        F.normalize(torch.randn(rows, channels, generator=generator), dim=1) for rows in (queries, queries, queue)
    )
    on_cpu = q, F.normalize(q + 0.5 * noise, dim=1), negatives
    tensors = tuple(tensor.to(device) for tensor in on_cpu)
    objective = InfoNCE(temperature=_TEMPERATURE, kernels=kernels)

    def ours(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
        return objective(ContrastBatch(q, k, negatives), 0)

    def run(loss: Callable[..., Tensor], q: Tensor, k: Tensor, negatives: Tensor) -> dict[str, Tensor]:
        q = q.detach().requires_grad_()
        value = loss(q, k, negatives)
        return {"loss": value.detach(), "gradient of q": torch.autograd.grad(value, q)[0]}

    exact = run(plain_info_nce, *(tensor.double() for tensor in on_cpu))
    found, plain = (run(loss, *tensors) for loss in (ours, plain_info_nce))
    # The fused loss rounds its operands to 11 bits where torch does so in convolutions.
    errors = worst(found, plain, exact, floor=1e-3 if kernels == "triton" else 5e-6, dtype="fp32")
    ours_s, plain_s = (
        seconds_per_call(lambda loss=loss: run(loss, *tensors), str(device)) for loss in (ours, plain_info_nce)
    )
    return _verdict(kernels, errors, ours_s, plain_s, 4 * channels * (queue + 3 * queries))


def plain_info_nce(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
    """The cross entropy that `step.info_nce` documents."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1) / _TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def update(target: Target) -> Finding:
    """SGD of the query encoder and the moving average of the key encoder, in one pass over the parameters."""
    device = torch.device(target.device)
    return update_kernel(implementation(device), device, _PARAMETERS[device.type])


def update_kernel(kernels: str, device: torch.device, parameters: int) -> Finding:
    """Two steps against `torch.optim.SGD` and `lerp_`, with about `parameters` of them."""
    generator = torch.Generator().manual_seed(0)
    values, noise, grads = torch.randn(3, parameters, generator=generator)
    on_cpu = values, values + 0.01 * noise, 0.1 * grads
    start = tuple(tensor.to(device) for tensor in on_cpu)
    query, key = (FlatParameters(_OneVector(start[i].clone(), trained=i == 0)) for i in (0, 1))
    step = MomentumUpdate(query, key, sgd_momentum=_SGD_MOMENTUM, weight_decay=_WEIGHT_DECAY, kernels=kernels)
    lr, ema = (torch.tensor(value, dtype=torch.float64, device=device) for value in (_LR, _EMA))
    ok = torch.ones((), dtype=torch.bool, device=device)
    assert query.grads is not None
    for _ in range(2):
        query.grads[:parameters].copy_(start[2])
        step(lr, ema, ok)
    found = {"query": query.values, "key": key.values, "momentum buffer": step.momentum_buffer}
    found = {name: tensor[:parameters].clone() for name, tensor in found.items()}

    plain, plain_step = _plain_update(*(tensor.clone() for tensor in start))
    exact, exact_step = _plain_update(*(tensor.double() for tensor in on_cpu))
    for _ in range(2):
        plain_step()
        exact_step()
    errors = worst(found, plain(), exact(), floor=5e-7, dtype="fp32")
    ours_s = seconds_per_call(lambda: step(lr, ema, ok), str(device))
    plain_s = seconds_per_call(plain_step, str(device))
    # Query, key, gradient and momentum buffer are read, and written but for the gradient.
    return _verdict(kernels, errors, ours_s, plain_s, 7 * 4 * parameters)


class _OneVector(nn.Module):
    """A module whose only parameter is a vector."""

    def __init__(self, values: Tensor, trained: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=trained)


def _plain_update(
    query: Tensor, key: Tensor, grads: Tensor
) -> tuple[Callable[[], dict[str, Tensor]], Callable[[], None]]:
    """The state of torch's own SGD with a moving average, and the function that does a step."""
    parameter = nn.Parameter(query)
    sgd = torch.optim.SGD([parameter], lr=_LR, momentum=_SGD_MOMENTUM, weight_decay=_WEIGHT_DECAY)

    def step() -> None:
        parameter.grad = grads
        sgd.step()
        key.lerp_(parameter.detach(), 1 - _EMA)

    def state() -> dict[str, Tensor]:
        buffer = sgd.state[parameter]["momentum_buffer"]
        return {"query": parameter.detach(), "key": key, "momentum buffer": buffer}

    return state, step


def _verdict(kernels: str, errors: Errors, seconds: float, plain_seconds: float, moved_bytes: int) -> Finding:
    return verdict(
        kernels,
        errors,
        seconds=seconds,
        plain_seconds=plain_seconds,
        moved_bytes=moved_bytes,
        advice=USE_TORCH if kernels == "triton" else ADVICE,
    )
