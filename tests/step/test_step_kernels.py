"""The step with Triton's kernels, on a CPU in their interpreter, against the step with torch's operations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch

from fastmoco.errors import BackendMissingError, ConfigError
from fastmoco.model.batchnorm.split import SplitBatchNorm2d, use_kernels
from fastmoco.model.resnet import BasicBlock, Bottleneck, fuse_convolutions, recomputed
from fastmoco.step.kernels import check_kernels, own_kernels
from fastmoco.step.sgd_ema import MomentumUpdate
from tests.step.test_step_parity import EMA, LR, changed, make_step, random_views, relative_error, whole_state

pytestmark = pytest.mark.any_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_steps_with_kernels_are_the_steps_without(symmetric: bool, require_backend: Callable[[str], None]) -> None:
    """From the same state each time: see test_step_parity on what rounding does to two float32 trajectories."""
    require_backend("triton")
    ours, plain = (
        make_step(symmetric=symmetric, bn_splits=2, kernels=kernels, device=DEVICE) for kernels in ("triton", "torch")
    )
    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        for target, source in zip(ours.changed_tensors(), plain.changed_tensors(), strict=True):
            target.copy_(source)
        views = random_views(generator, device=DEVICE)
        for step in (ours, plain):
            step(views, LR, EMA)
        for target, source in zip(ours.changed_tensors(), plain.changed_tensors(), strict=True):
            if target.is_floating_point() and source.any():
                assert relative_error(target, source) <= 1e-4
            else:
                assert torch.equal(target, source)
    assert plain.read_metrics()["skipped_steps"] == 0


@pytest.mark.slow
def test_error_of_a_float16_step_is_no_larger_than_without_kernels(require_backend: Callable[[str], None]) -> None:
    """Against float32. Gradients have no such order: theirs is the error of the few activations that rounding moves
    across the kink of a ReLU. But they are scaled back, without which they would be 64 times as large."""
    require_backend("triton")
    views = random_views(torch.Generator().manual_seed(2), device=DEVICE)
    exact, plain, ours = (
        make_step(bn_splits=2, dtype=dtype, kernels=kernels, device=DEVICE)
        for dtype, kernels in ((torch.float32, "torch"), (torch.float16, "torch"), (torch.float16, "triton"))
    )
    for step in (exact, plain, ours):
        if step.scaler is not None:
            step.scaler.scale.fill_(64.0)  # the first steps of the usual scale would be skipped
        step(views, LR, EMA)
        assert step.read_metrics()["skipped_steps"] == 0
    for ours_is, plain_is, truth in (
        (ours.query.buffers, plain.query.buffers, exact.query.buffers),
        (ours.dictionary.keys, plain.dictionary.keys, exact.dictionary.keys),
    ):
        assert relative_error(ours_is, truth) <= 1.3 * relative_error(plain_is, truth) + 1e-3
    assert relative_error(ours.update.state()["momentum_buffer"], exact.update.state()["momentum_buffer"]) <= 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with NaN in NumPy, which says so
def test_a_bad_batch_leaves_no_trace_with_kernels(require_backend: Callable[[str], None]) -> None:
    require_backend("triton")
    step = make_step(bn_splits=2, kernels="triton", device=DEVICE)
    views = random_views(torch.Generator().manual_seed(3), device=DEVICE)
    views.query[0, 0, 0, 0] = float("nan")
    before = whole_state(step)
    step(views, LR, EMA)
    assert changed(before, whole_state(step)) == []
    assert step.read_metrics()["skipped_steps"] == 1


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_block_with_kernels_is_the_block_without(
    block: type[BasicBlock | Bottleneck], training: bool, require_backend: Callable[[str], None]
) -> None:
    require_backend("triton")
    channels = 4 * block.expansion
    torch.manual_seed(0)
    downsample = torch.nn.Sequential(torch.nn.Conv2d(8, channels, 1, 2, bias=False), SplitBatchNorm2d(channels, 2))
    layer = block(8, 4, 2, downsample, norm_layer=lambda c: SplitBatchNorm2d(c, 2)).to(DEVICE).train(training)
    x = torch.randn(4, 8, 6, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    upstream = list(torch.randn(2, 4, channels, 3, 3, device=DEVICE))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    found = {}
    for kernels in ("torch", "triton"):
        layer.load_state_dict(state)
        use_kernels(layer, kernels)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y, again = layer((leaf, leaf))
        assert torch.equal(y, again)
        torch.autograd.backward([y, again], upstream)
        buffers = [b.clone() for b in layer.buffers()]
        found[kernels] = [y, leaf.grad, *(p.grad for p in layer.parameters()), *buffers]
    for ours, plain in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_fused_bottlenecks_can_be_recomputed(require_backend: Callable[[str], None]) -> None:
    """With activation checkpointing, gradients and statistics are the same bit for bit."""
    require_backend("triton")
    torch.manual_seed(0)
    blocks = (Bottleneck(24, 6, norm_layer=lambda c: SplitBatchNorm2d(c, 2)) for _ in range(2))
    stage = torch.nn.Sequential(*blocks).to(DEVICE)
    fuse_convolutions(stage, True)
    x = torch.randn(4, 24, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    state = {name: tensor.clone() for name, tensor in stage.state_dict().items()}
    found = []
    for forward in (stage, partial(recomputed, stage)):
        stage.load_state_dict(state)
        stage.zero_grad()
        leaf = x.clone().requires_grad_()
        y, again = forward((leaf, leaf))
        (y.square().sum() + again.sum()).backward()
        gradients = [p.grad.clone() for p in stage.parameters() if p.grad is not None]
        found.append([y.detach(), leaf.grad, *gradients, *(b.clone() for b in stage.buffers())])
    assert all(map(torch.equal, *found))
    assert len(found[0]) == 2 + len(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fused_bottlenecks_are_those_without(dtype: torch.dtype, require_backend: Callable[[str], None]) -> None:
    """Under autocast, its error is that of the block without, within a factor."""
    require_backend("triton")
    torch.manual_seed(0)
    shortcut = torch.nn.Sequential(torch.nn.Conv2d(8, 24, 1, 2, bias=False), SplitBatchNorm2d(24, 2))
    layer = torch.nn.Sequential(
        Bottleneck(8, 6, 2, shortcut, norm_layer=lambda c: SplitBatchNorm2d(c, 2)),
        Bottleneck(24, 6, norm_layer=lambda c: SplitBatchNorm2d(c, 2)),
    ).to(DEVICE)
    x = torch.randn(4, 8, 6, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    upstream = list(torch.randn(2, 4, 24, 3, 3, device=DEVICE))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    found: dict[str, list[torch.Tensor]] = {}
    for kernels in ("exact", "torch", "triton-fused"):
        layer.load_state_dict(state)
        use_kernels(layer, own_kernels(kernels) if kernels != "exact" else "torch")
        assert fuse_convolutions(layer, kernels == "triton-fused") == 2
        layer.zero_grad()
        low = kernels != "exact" and dtype != torch.float32
        leaf = x.to(dtype if low else torch.float32, copy=True).requires_grad_()
        with torch.autocast(DEVICE, dtype, enabled=low):
            y, again = layer((leaf, leaf))
        assert torch.equal(y, again)
        assert y.dtype == leaf.dtype
        torch.autograd.backward([y, again], [grad.to(y.dtype) for grad in upstream])
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        assert len(gradients) == len(list(layer.parameters()))
        assert leaf.grad is not None
        assert all(grad.dtype == torch.float32 for grad in gradients)
        statistics = [buffer.clone() for buffer in layer.buffers() if buffer.is_floating_point()]
        found[kernels] = [y, leaf.grad, *gradients, *statistics]
    for ours, plain, exact in zip(found["triton-fused"], found["torch"], found["exact"], strict=True):
        allowed = 1e-5 + 2 * relative_error(plain.float(), exact)
        assert relative_error(ours.float(), exact) <= allowed


def test_convolutions_are_fused_in_bottlenecks_only(require_backend: Callable[[str], None]) -> None:
    require_backend("triton")
    with pytest.raises(ConfigError, match="this backbone has none: use --kernels triton"):
        make_step(kernels="triton-fused", device=DEVICE)


def test_fused_convolutions_need_tensor_cores_with_bfloat16(
    monkeypatch: pytest.MonkeyPatch, require_backend: Callable[[str], None]
) -> None:
    require_backend("triton")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    check_kernels("triton-fused", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    check_kernels("triton", cuda)
    with pytest.raises(BackendMissingError, match=r"needs a GPU of compute capability 8\.0 or higher"):
        check_kernels("triton-fused", cuda)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "stem", "backend", "dtype"),
    [
        ("resnet18", "cifar", "aot_eager", torch.bfloat16),  # with weights that are kept in 16 bits
        ("resnet50", "imagenet", "aot_eager", torch.float32),
        ("resnet18", "cifar", "inductor", torch.float32),
    ],
)
def test_a_compiled_step_with_kernels_is_the_eager_one(
    arch: str, stem: str, backend: str, dtype: torch.dtype, require_backend: Callable[[str], None]
) -> None:
    require_backend("triton")
    eager, compiled = (
        make_step(arch=arch, stem=stem, bn_splits=2, kernels="triton", dtype=dtype, device=DEVICE) for _ in range(2)
    )
    torch._dynamo.reset()
    compiled.model.compile_encoders(backend=backend)
    views = random_views(torch.Generator().manual_seed(8), device=DEVICE)
    for step in (eager, compiled):
        step(views, LR, EMA)
    low = dtype != torch.float32
    assert compiled.read_metrics()["loss"] == pytest.approx(eager.read_metrics()["loss"], rel=1e-2 if low else 1e-4)
    momentum, expected = (step.update.state()["momentum_buffer"] for step in (compiled, eager))
    assert relative_error(momentum, expected) <= (0.1 if low else 1e-2)
    for ours, plain in ((compiled.query, eager.query), (compiled.key, eager.key)):
        assert relative_error(ours.buffers, plain.buffers) <= (1e-2 if low else 1e-4)
    assert compiled.query.is_intact()


@pytest.mark.slow
def test_steps_with_like_encoders_share_what_is_compiled(require_backend: Callable[[str], None]) -> None:
    """The check, the tuning and the run compile once; results are the same bit for bit."""
    require_backend("triton")
    steps = [make_step(bn_splits=2, kernels="triton", device=DEVICE) for _ in range(2)]
    views = random_views(torch.Generator().manual_seed(8), device=DEVICE)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for step in steps:
        step.model.compile_encoders(backend="aot_eager")
        step(views, LR, EMA)
    assert changed(*map(whole_state, steps)) == []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "of the query and of the key encoder"


def test_compiled_encoders_have_the_kernels_too(require_backend: Callable[[str], None]) -> None:
    require_backend("triton")
    for compile in ("off", "default"):
        step = make_step(kernels="triton", compile=compile, device=DEVICE)
        norms = [layer for layer in step.model.modules() if isinstance(layer, SplitBatchNorm2d)]
        assert {norm.kernels for norm in norms} == {"triton"}
        assert isinstance(step.update, MomentumUpdate)
        assert step.update.kernels == "triton"


def test_kernels_that_are_asked_for_and_missing_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown kernels 'cuda'; expected one of torch, triton"):
        make_step(kernels="cuda")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendMissingError, match=r"not installed .*: install it, or use --kernels torch"):
        make_step(kernels="triton")
    check_kernels("torch", torch.device("cpu"))


def test_kernels_need_a_gpu(monkeypatch: pytest.MonkeyPatch, require_backend: Callable[[str], None]) -> None:
    require_backend("triton")
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    check_kernels("triton", torch.device("cuda"))
    with pytest.raises(BackendMissingError, match="needs a GPU, and the device is cpu: use --kernels torch"):
        check_kernels("triton", torch.device("cpu"))
