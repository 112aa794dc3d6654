"""A captured step is used by all ranks or by none; a capture that was asked for must succeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmoco.distributed.world import World
from fastmoco.errors import ConfigError
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.tuning.candidates import Candidate
from fastmoco.tuning.capture import captured
from fastmoco.tuning.check import build_for
from tests.step.test_cuda_graph import Recorder
from tests.tuning.tiny import BATCH, CPU, IMAGES, tiny_config, tiny_views

REFUSED = RuntimeError("ncclAllReduce is not permitted when stream is capturing")


def two_ranks(other_fails: bool) -> Any:
    """A world whose sums have the part of another rank."""

    def all_reduce(values: torch.Tensor) -> Any:
        return SimpleNamespace(wait=lambda: values + other_fails)

    return SimpleNamespace(size=2, device=CPU, all_reduce=all_reduce)


@pytest.fixture
def step():
    return build_for(Candidate("fp32"), tiny_config(), BATCH, IMAGES, CPU)


def capture(error: RuntimeError | None):
    return lambda step, views: GraphedStep(step, views, Recorder(error))


def test_a_capture_that_works_is_used(step) -> None:
    for world in (World(CPU), two_ranks(other_fails=False)):
        found, failure = captured(step, tiny_views(), world, required=False, graph=capture(None))
        assert isinstance(found, GraphedStep)
        assert failure is None


def test_a_capture_that_is_refused_is_left_out_and_changes_nothing(step) -> None:
    before = [tensor.clone() for tensor in step.changed_tensors()]
    for world in (World(CPU), two_ranks(other_fails=True)):
        found, failure = captured(step, tiny_views(), world, required=False, graph=capture(REFUSED))
        assert found is step
        assert failure is not None
        assert "ncclAllReduce is not permitted" in failure
    for tensor, value in zip(step.changed_tensors(), before, strict=True):
        assert torch.equal(tensor, value)


def test_no_rank_uses_a_graph_that_another_one_lacks(step) -> None:
    found, failure = captured(step, tiny_views(), two_ranks(True), required=False, graph=capture(None))
    assert found is step
    assert failure == "it cannot be captured on another device"


def test_a_capture_that_was_asked_for_is_an_error_if_it_is_refused(step) -> None:
    with pytest.raises(ConfigError, match="use --cuda-graph off"):
        captured(step, tiny_views(), World(CPU), required=True, graph=capture(REFUSED))
