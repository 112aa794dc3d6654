"""A snapshot keeps the values of the moment it was taken, in one copy for each flat buffer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_checkpoint import assert_same, tensors_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmoco.commands.train_arguments import parse_train
from fastmoco.run.snapshot import HostBuffers
from fastmoco.run.start import run_context
from fastmoco.run.state import TrainState, build_state
from tests.run.test_train import RESIDENT


class Operations(TorchDispatchMode):
    """Counts the operations in its block by name."""

    def __enter__(self) -> Operations:
        self.counts: Counter[str] = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["fp32", "fp16"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TrainState]:
    """A CIFAR ResNet-18 before its first step."""
    config = parse_train([*RESIDENT, "--amp", request.param, "--out", str(tmp_path / "run")])
    with run_context(config, Console(quiet=True)) as context:
        yield build_state(context.config, context.world, context.dataset.train)


def storages(tensors: dict[str, Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


def test_a_state_is_copied_in_a_few_large_copies(state: TrainState) -> None:
    """Values and counters of two encoders, their statistics, momentum, keys, pointer and sums; scale and its count.

    A digest needs as few.
    """
    assert len(state.tensors()) == 312 + 2 * (state.train_step.scaler is not None)
    expected = 9 + 2 * (state.train_step.scaler is not None)
    with Operations() as operations:
        HostBuffers().take(state.tensors())
    assert operations.counts["aten.copy_"] == expected
    assert not operations.counts["aten._to_copy"]
    with Operations() as operations:
        first = state.digests()
    assert operations.counts["aten.copy_"] == expected
    assert state.digests() == first
    state.train_step.query.values[0] += 1
    assert {name for name, digest in state.digests().items() if digest != first[name]} == {"model/query"}


@pytest.mark.any_device
def test_later_changes_are_not_seen() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    live = {name: tensor.to(device) for name, tensor in tensors_of(7).items()}
    flat = torch.arange(24, dtype=torch.float32, device=device)
    live |= {"channels last view": flat.view(2, 2, 2, 3).permute(0, 3, 1, 2), "parameter": torch.nn.Parameter(flat[:3])}
    expected = {name: tensor.detach().cpu().clone() for name, tensor in live.items()}
    snapshot = HostBuffers().take(live)
    with torch.no_grad():
        for tensor in live.values():
            tensor.zero_()
    copied = snapshot.wait()
    assert_same(copied, expected)
    assert all(tensor.device.type == "cpu" for tensor in copied.values())
    assert {name: t.stride() for name, t in copied.items()} == {name: t.stride() for name, t in live.items()}


def test_memory_is_reused() -> None:
    buffers = HostBuffers()
    first = storages(buffers.take(tensors_of(1)).wait())
    copied = buffers.take(tensors_of(2)).wait()
    assert storages(copied) == first
    assert_same(copied, tensors_of(2))
    larger = {"large": torch.arange(1000), **tensors_of(3)}
    assert_same(buffers.take(larger).wait(), larger)


def test_memory_that_cannot_be_pinned_is_used_and_the_reason_kept() -> None:
    """Without a GPU, torch refuses to pin memory."""
    buffers = HostBuffers()
    assert not buffers.not_pinned
    memory = buffers._allocate(8, pinned=True)
    assert memory.nbytes == 8
    assert not memory.is_pinned()
    assert buffers.not_pinned
    assert "\n" not in buffers.not_pinned
