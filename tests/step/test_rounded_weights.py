"""Weights kept in 16 bits beside the parameters: the same bits as autocast, and never out of date."""

from __future__ import annotations

import pytest
import torch

from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.flat_params import FlatParameters
from fastmoco.step.train_step import TrainStep
from tests.step.test_cuda_graph import Recorder
from tests.step.test_step_parity import EMA, LR, changed, make_step, random_views, whole_state


def trained(steps: int, **options) -> TrainStep:
    """A step after some batches."""
    step = make_step(bn_splits=2, head=(12,), **options)
    if step.scaler is not None:
        step.scaler.scale.fill_(64.0)
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        step(random_views(generator), LR, EMA)
    return step


def is_up_to_date(step: TrainStep) -> bool:
    for flat in (step.query, step.key):
        assert flat.rounded is not None
        if not torch.equal(flat.rounded, flat.values.to(flat.rounded.dtype)):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["one-loss", "symmetric"])
def test_training_has_the_bits_of_autocast(
    dtype: torch.dtype, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trained(3, dtype=dtype, symmetric=symmetric)
    assert is_up_to_date(ours)
    monkeypatch.setattr(FlatParameters, "keep_rounded", lambda *_: {})
    autocast = trained(3, dtype=dtype, symmetric=symmetric)
    assert changed(whole_state(autocast), whole_state(ours)) == []
    assert ours.read_metrics() == autocast.read_metrics()


def test_only_what_autocast_rounds_is_replaced() -> None:
    step = trained(0, dtype=torch.bfloat16)
    query, key = step.model.weights
    assert query.keys() == key.keys()
    assert {name.rpartition(".")[0] for name in query if "conv" in name} == {
        name for name, layer in step.model.query.named_modules() if "conv" in name and name
    }
    assert {"head.0.weight", "head.0.bias", "head.2.weight"} <= query.keys()
    assert not any("bn" in name or "downsample.1" in name for name in query)
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in query.values())
    assert not any(leaf.requires_grad for leaf in key.values())


def test_in_float32_nothing_is_rounded() -> None:
    step = trained(1)
    assert step.query.rounded is None
    assert step.model.weights == ({}, {})


@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graph"])
def test_weights_loaded_between_steps_are_those_of_the_next(graphed: bool) -> None:
    """As are single parameters that are changed in place."""
    other = trained(2, dtype=torch.bfloat16)
    ours, never = trained(0, dtype=torch.bfloat16), trained(0, dtype=torch.bfloat16)
    views = random_views(torch.Generator().manual_seed(6))
    run = GraphedStep(ours, views, Recorder()) if graphed else ours
    for step in (ours, never):
        step.model.load_state_dict(other.model.state_dict())
        with torch.no_grad():
            step.model.query.get_parameter("head.0.weight").mul_(1.5)
    never.query.round()
    never.key.round()
    run(views, LR, EMA)
    never(views, LR, EMA)
    assert changed(whole_state(never), whole_state(ours)) == []
    assert is_up_to_date(ours)


def test_a_skipped_step_leaves_them() -> None:
    step = trained(1, dtype=torch.bfloat16)
    views = random_views(torch.Generator().manual_seed(3))
    views.query[0, 0, 0, 0] = float("nan")
    before = [step.query.rounded.clone(), step.key.rounded.clone()]  # pyright: ignore[reportOptionalMemberAccess]
    step(views, LR, EMA)
    assert step.read_metrics()["skipped_steps"] == 1
    assert torch.equal(step.query.rounded, before[0])  # pyright: ignore[reportArgumentType]
    assert torch.equal(step.key.rounded, before[1])  # pyright: ignore[reportArgumentType]
