"""The fused update against the plain one in float64: same numbers, nothing touched where a step is not ok."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastmoco.step.sgd_ema import momentum_update

pytestmark = pytest.mark.any_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {"sgd_momentum": 0.9, "weight_decay": 5e-4}


@pytest.fixture
def fused(require_backend: Callable[[str], None]) -> ModuleType:
    require_backend("triton")
    from fastmoco.step import sgd_ema_triton as momentum_triton

    return momentum_triton


def state(size: int, seed: int = 0) -> list[Tensor]:
    """Query, key, gradients and momentum buffer, as a run in progress has them."""
    generator = torch.Generator().manual_seed(seed)
    query, noise, grads, buffer = torch.randn(4, size, generator=generator)
    return [t.to(DEVICE) for t in (query, query + 0.01 * noise, 0.1 * grads, 0.1 * buffer)]


def scalars(lr: float, ema_momentum: float, ok: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "lr": torch.tensor(lr, dtype=dtype, device=DEVICE),
        "ema_momentum": torch.tensor(ema_momentum, dtype=dtype, device=DEVICE),
        "ok": torch.tensor(ok, device=DEVICE),
    }


def error(tensors: list[Tensor], exact: list[Tensor]) -> float:
    return max((t.double() - e).abs().max().item() for t, e in zip(tensors, exact, strict=True))


@pytest.mark.parametrize(
    ("size", "num_decayed"), [(1, 1), (7, 0), (2048, 1000), (5000, 5000)], ids=["one", "none", "some", "all"]
)
def test_matches_the_plain_update_over_several_steps(fused: ModuleType, size: int, num_decayed: int) -> None:
    tensors, plain = state(size), state(size)
    exact = [t.double() for t in plain]
    for lr, ema_momentum in ((0.3, 0.999), (0.2, 0.99), (0.1, 0.9996)):
        values = scalars(lr, ema_momentum)
        for update, buffers in ((fused.momentum_update, tensors), (momentum_update, plain), (momentum_update, exact)):
            update(*buffers, **values, **SETTINGS, num_decayed=num_decayed)
    assert error(tensors, exact) <= error(plain, exact) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ema_momentum_of_zero_copies_the_query(fused: ModuleType, dtype: torch.dtype) -> None:
    query, key, grads, buffer = state(100)
    fused.momentum_update(query, key, grads, buffer, **scalars(0.1, 0.0, dtype=dtype), **SETTINGS, num_decayed=50)
    assert torch.equal(query, key)


def test_the_small_ema_share_keeps_its_digits(fused: ModuleType) -> None:
    """1 − 0.9999 in float32 is wrong by 1e-4 of itself: a key at 0 would move by as much too little or too far."""
    query, key = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    zeros = torch.zeros(64, device=DEVICE)
    fused.momentum_update(query, key, zeros, zeros.clone(), **scalars(0.1, 0.9999), **SETTINGS, num_decayed=0)
    torch.testing.assert_close(key.double(), torch.full_like(key, 1e-4).double(), rtol=2e-7, atol=0)


def test_where_not_ok_nothing_changes(fused: ModuleType) -> None:
    tensors = state(3000)
    tensors[2][::3] = float("nan")
    tensors[2][1::3] = float("inf")
    before = [t.clone() for t in tensors]
    fused.momentum_update(*tensors, **scalars(0.1, 0.99, ok=False), **SETTINGS, num_decayed=3000)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor.view(torch.int32), old.view(torch.int32))


@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_new_parameters_are_rounded_too(fused: ModuleType, dtype: torch.dtype, ok: bool) -> None:
    tensors, alone = state(2049), state(2049)
    rounded = tuple(tensor.to(dtype) for tensor in tensors[:2])
    before = [tensor.clone() for tensor in rounded]
    fused.momentum_update(*tensors, **scalars(0.1, 0.99, ok), **SETTINGS, num_decayed=10, rounded=rounded)
    fused.momentum_update(*alone, **scalars(0.1, 0.99, ok), **SETTINGS, num_decayed=10)
    assert all(torch.equal(a, b) for a, b in zip(tensors, alone, strict=True))
    for half, full, old in zip(rounded, tensors[:2], before, strict=True):
        if not ok:
            assert torch.equal(half, old)
        elif DEVICE == "cuda":
            assert torch.equal(half, full.to(dtype))
        else:  # Triton's interpreter cuts bfloat16 off where a device rounds it
            torch.testing.assert_close(half.float(), full, rtol=2**-7, atol=2**-14)


def test_scaled_gradients_are_unscaled(fused: ModuleType) -> None:
    tensors, scaled = state(500), state(500)
    scale = torch.tensor(2.0**16, device=DEVICE)
    scaled[2].mul_(scale)
    grads = scaled[2].clone()
    values = scalars(0.1, 0.99)
    fused.momentum_update(*tensors, **values, **SETTINGS, num_decayed=500)
    fused.momentum_update(*scaled, **values, **SETTINGS, num_decayed=500, scale=scale)
    assert torch.equal(scaled[2], grads)
    assert error([scaled[i] for i in (0, 1, 3)], [tensors[i].double() for i in (0, 1, 3)]) <= 1e-6


@pytest.mark.gpu
def test_replays_in_a_cuda_graph_with_the_scalars_of_the_moment(fused: ModuleType) -> None:
    tensors, values = state(5000), scalars(0.5, 0.5)
    fused.momentum_update(*tensors, **values, **SETTINGS, num_decayed=100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.momentum_update(*tensors, **values, **SETTINGS, num_decayed=100)
    for tensor, fresh in zip(tensors, state(5000, seed=1), strict=True):
        tensor.copy_(fresh)
    exact = [t.double() for t in tensors]
    values["lr"].fill_(0.02)
    values["ema_momentum"].fill_(0.99)
    graph.replay()
    momentum_update(*exact, **values, **SETTINGS, num_decayed=100)
    assert error(tensors, exact) <= 1e-6


@pytest.mark.gpu
@pytest.mark.slow
def test_reaches_the_end_of_a_buffer_of_more_than_2_to_the_31_floats(fused: ModuleType) -> None:
    size = 2**31 + 2**12
    if torch.cuda.mem_get_info()[0] < 5 * 4 * size:
        pytest.skip("needs 45 GB of device memory")
    query, key, grads, buffer = (torch.ones(size, device=DEVICE) for _ in range(4))
    fused.momentum_update(query, key, grads, buffer, **scalars(1.0, 0.0), **SETTINGS, num_decayed=0)
    expected = torch.tensor(1.0 - 1.9, device=DEVICE)
    for part in (query[:2048], query[-2048:], key[-2048:]):
        torch.testing.assert_close(part, expected.expand_as(part))
