"""One step and its restored state, and the distance between two outcomes."""

from __future__ import annotations

import pytest
import torch

from fastmoco.distributed.world import World
from fastmoco.run.state import build_train_step
from fastmoco.tuning.check import first_images
from fastmoco.tuning.compare import StepResult, perturb, relative_errors, run_step
from tests.tuning.tiny import CPU, IMAGES, tiny_config, tiny_views


@pytest.mark.parametrize("options", [{}, {"mechanism": "memory-bank"}, {"amp": "fp16"}, {"symmetric": True}])
def test_a_compared_step_restores_the_state(options: dict) -> None:
    step = build_train_step(tiny_config(**options), World(CPU), IMAGES)
    before = [tensor.clone() for tensor in step.changed_tensors()]
    result = run_step(step, tiny_views(), 0.1)
    for tensor, value in zip(step.changed_tensors(), before, strict=True):
        assert torch.equal(tensor, value)
    changed = {group: any(bool((t != result.before[group][n]).any()) for n, t in named.items())
               for group, named in result.after.items()}  # fmt: skip
    assert all(changed.values()), changed
    assert {"loss", "gradient", "query", "key", "statistics"} < set(changed)


def test_a_step_that_is_not_finite_is_an_error() -> None:
    step = build_train_step(tiny_config(), World(CPU), IMAGES)
    views = tiny_views()
    views.query[0, 0, 0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="not finite"):
        run_step(step, views, 0.1)


def result(after: list[float], before: list[float]) -> StepResult:
    return StepResult({"query": {"w": torch.tensor(after)}}, {"query": {"w": torch.tensor(before)}})


def test_errors_are_relative_to_the_change() -> None:
    reference = result([1.0, 2.0], [1.0, 1.0])
    assert relative_errors(result([1.0, 2.1], [1.0, 1.0]), reference) == {"query w": pytest.approx(0.1, rel=2e-3)}
    assert relative_errors(result([1.0, float("nan")], [1.0, 1.0]), reference) == {"query w": float("inf")}
    unchanged = result([1.0, 1.0], [1.0, 1.0])
    rounded = result([1.0, 1.0 + 1.2e-7], [1.0, 1.0])
    assert relative_errors(rounded, unchanged)["query w"] < 1, "rounding of what should not change is no error"


def test_perturbed_weights_differ_by_rounding() -> None:
    step = build_train_step(tiny_config(), World(CPU), IMAGES)
    before = step.query.values.clone()
    perturb(step)
    change = (step.query.values - before).abs() / before.abs().clamp(min=1e-30)
    assert 0 < float(change.max()) < 3e-7


def test_a_part_of_a_batch_keeps_the_pairs() -> None:
    views = tiny_views()
    part = first_images(views, 4)
    assert torch.equal(part.query, views.query[:4])
    assert sorted(part.key_order.tolist()) == [0, 1, 2, 3]
    for row, image in enumerate(part.key_order.tolist()):
        whole = views.key_order.tolist().index(image)
        assert torch.equal(part.key[row], views.key[whole])
    assert part.key.is_contiguous(memory_format=torch.channels_last)
