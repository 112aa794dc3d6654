"""The training step of a small encoder: eager, as a CUDA graph, and compiled.

B batch · S side of a view · K queue
"""

from __future__ import annotations

import os
import shutil
import time

import torch
from torch import Tensor, nn

from fastmoco.device import DTYPES, pick_amp
from fastmoco.doctor.compare import relative_error
from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.doctor.kernels import implementation
from fastmoco.doctor.units import seconds_per_call, si
from fastmoco.errors import ConfigError
from fastmoco.model.encoder import build_encoder
from fastmoco.model.key_queue import KeyQueue
from fastmoco.model.moco import MoCo
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views

_BATCH, _SIDE, _QUEUE, _DIM = 16, 32, 256, 64
_LR, _EMA = 0.03, 0.99
_STEPS = 3
_LOSS_ERROR = 0.05  # of the loss: bfloat16 gives 1e-3
_COMPILED_ERROR = 1e-5
GRAPH_BRINGS = "the whole step in one launch, which matters most for small images"
COMPILE_BRINGS = "fewer launches around the batch norm kernels, for --compile default"


def small_step(device: torch.device, amp: str) -> TrainStep:
    """An eighth-width ResNet-18, with the kernels that training would use on the device. Always the same weights."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", width=0.125, stem="cifar", dim=_DIM, bn_splits=2)
    queue = KeyQueue(_QUEUE, _DIM, torch.Generator().manual_seed(0)).to(device)
    return TrainStep(
        MoCo(encoder.to(device)),
        queue,
        temperature=0.2,
        symmetric=False,
        sgd_momentum=0.9,
        weight_decay=5e-4,
        dtype=DTYPES[amp],
        kernels=implementation(device),
    )


def random_views(device: torch.device, amp: str) -> Views:
    """Views of noise, always the same."""
    generator = torch.Generator().manual_seed(1)
    query, noise = torch.randn(2, _BATCH, 3, _SIDE, _SIDE, generator=generator)
    query, key = (
        images.to(device, DTYPES[amp]).contiguous(memory_format=torch.channels_last)
        for images in (query, query + noise)
    )
    order = torch.randperm(_BATCH, generator=generator).to(device)
    return Views(query, key, order, torch.arange(_BATCH, device=device))


def eager(target: Target) -> Finding:
    """The loss of the first step against that on the CPU in float32, and the time of the following ones."""
    device, cpu = torch.device(target.device), torch.device("cpu")
    amp = pick_amp("auto", device)
    torch.set_num_threads(1)  # operations this small are no faster with more, and far slower on a busy machine
    plain, step = small_step(cpu, "fp32"), small_step(device, amp)
    plain(random_views(cpu, "fp32"), _LR, _EMA)
    expected = plain.read_metrics()["loss"]
    views = random_views(device, amp)
    if step.scaler is not None:
        step.scaler.scale.fill_(64.0)  # the usual first scale is too large for the first steps, which are then skipped
    step(views, _LR, _EMA)
    loss = step.read_metrics()["loss"]
    began = time.perf_counter()
    for _ in range(_STEPS):
        step(views, _LR, _EMA)
    step.read_metrics()  # waits for the device
    seconds = (time.perf_counter() - began) / _STEPS
    figures = {
        "loss": loss,
        "cpu_fp32_loss": expected,
        "amp": amp,
        "seconds": seconds,
        "images_per_s": _BATCH / seconds,
    }
    shown = f"loss {loss:.4f}, on the CPU in fp32 {expected:.4f}"
    if not abs(loss - expected) <= _LOSS_ERROR * expected:
        advice = "training does not work on this device: try --kernels torch --amp fp32 --cuda-graph off"
        return Finding(status=Status.FAILED, text=f"a step in {amp} is wrong: {shown}", figures=figures, advice=advice)
    text = f"ResNet-18 of width 0.125 at {_SIDE} px in {amp}: {shown}; {si(seconds, 's')} for {_BATCH} images"
    return Finding(text=text, figures=figures)


def graph(target: Target) -> Finding:
    """Replays of a captured step against the same steps in eager mode, bit for bit."""
    device = torch.device(target.device)
    if device.type != "cuda":
        return Finding(status=Status.SKIPPED, text="needs a GPU")
    torch.backends.cudnn.benchmark = False  # so that both use the same algorithms
    torch.use_deterministic_algorithms(True, warn_only=True)
    amp = pick_amp("auto", device)
    views = random_views(device, amp)
    plain, captured = small_step(device, amp), small_step(device, amp)
    advice = f"train with --cuda-graph off; a graph would bring {GRAPH_BRINGS}"
    try:
        replayed = GraphedStep(captured, views)
    except ConfigError as error:
        return Finding(status=Status.FAILED, text=str(error), advice=advice)
    for step in (plain, replayed):
        for _ in range(_STEPS):
            step(views, _LR, _EMA)
    torch.cuda.synchronize()
    pairs = zip(plain.changed_tensors(), captured.changed_tensors(), strict=True)
    error = max(relative_error(b, a) for a, b in pairs)
    identical = all(torch.equal(a, b) for a, b in zip(plain.changed_tensors(), captured.changed_tensors(), strict=True))
    eager_s, replay_s = (
        seconds_per_call(lambda step=step: step(views, _LR, _EMA), target.device) for step in (plain, replayed)
    )
    figures = {
        "identical": identical,
        "error": error,
        "eager_seconds": eager_s,
        "replay_seconds": replay_s,
    }
    if not identical and not error <= 1e-3:
        text = f"replays differ from eager steps by {error:.1e}"
        return Finding(status=Status.FAILED, text=text, figures=figures, advice=advice)
    same = "the bits of eager steps" if identical else f"eager steps to {error:.0e}"
    return Finding(text=f"replays equal {same}, {eager_s / replay_s:.2g} times as fast", figures=figures)


def compiled(target: Target) -> Finding:
    """`torch.compile` of a small function with its gradient, without its caches."""
    device = torch.device(target.device)
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
        return Finding(
            status=Status.MISSING,
            text="there is no C++ compiler, which torch.compile needs on a CPU",
            advice=f"{COMPILE_BRINGS} (1 to 10 % on a CPU): apt-get install g++",
        )
    if device.type == "cuda" and implementation(device) != "triton":
        return Finding(
            status=Status.MISSING,
            text="torch.compile needs Triton on a GPU",
            advice=f"{COMPILE_BRINGS}: pip install triton",
        )
    # An empty cache: what an earlier run compiled shows nothing. No processes for two kernels, and no test programs for
    # each instruction set of the CPU, which take as long again.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(target.scratch, "compiled")
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(device)
    scale = nn.Parameter(torch.linspace(0.5, 1.5, 512, device=device))
    exact = _outputs(_normalised, x.double(), nn.Parameter(scale.detach().double()))
    began = time.perf_counter()
    found = _outputs(torch.compile(_normalised, dynamic=False), x, scale)
    seconds = time.perf_counter() - began
    error = max(relative_error(a, b) for a, b in zip(found, exact, strict=True))
    figures = {"compile_seconds": seconds, "error": error}
    if not error <= _COMPILED_ERROR:
        text = f"a compiled function is wrong: error {error:.1e}, allowed are {_COMPILED_ERROR:.0e}"
        return Finding(status=Status.FAILED, text=text, figures=figures, advice="train with --compile off")
    return Finding(text=f"compiles in {seconds:.1f} s, error {error:.0e}", figures=figures)


def _normalised(x: Tensor, scale: Tensor) -> Tensor:
    """Several elementwise operations and a reduction, as a compiler fuses them."""
    return torch.relu((x - x.mean(dim=0)) * torch.rsqrt(x.var(dim=0) + 1e-5) * scale)


def _outputs(function, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    y = function(x, scale)
    return y.detach(), torch.autograd.grad(y.square().sum(), scale)[0]
