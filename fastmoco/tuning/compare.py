"""The outcome of one training step, and how far it is from that of another implementation.

P floats of parameters with padding
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views

Named = dict[str, Tensor]

EMA_MOMENTUM = 0.5  # so that an error of the key encoder is not hidden by rounding, as it is with 0.999
MAX_SKIPPED = 24  # steps without an update until the initial loss scale of float16 fits the gradients
_ULP = torch.finfo(torch.float32).eps
_GROUP_SHARE = 1e-3  # a tensor is compared at least at this share of the magnitude of its group


@dataclass(frozen=True)
class StepResult:
    """State after one step, by group: loss, gradient (the optimiser's state, which starts at zero), query, key,
    statistics, and the dictionary. `before` are the values that the step started from."""

    after: Mapping[str, Named]
    before: Mapping[str, Named]


def run_step(step: TrainStep, views: Views, lr: float, call: TrainStep | GraphedStep | None = None) -> StepResult:
    """Run one step and restore the state that it started from.

    call  what is called, `step` or its captured form

    Raises ArithmeticError if loss or gradient are not finite.
    """
    call = step if call is None else call
    changed = step.changed_tensors()
    saved = [tensor.clone() for tensor in changed]
    before = _groups(step, 0.0)
    try:
        for _ in range(1 if step.scaler is None else MAX_SKIPPED):
            call(views, lr, EMA_MOMENTUM)
            metrics = step.read_metrics()
            if not metrics["skipped_steps"]:
                return StepResult(_groups(step, metrics["loss"]), before)
        raise ArithmeticError("loss or gradient are not finite")
    finally:
        with torch.no_grad():
            for tensor, value in zip(changed, saved, strict=True):
                tensor.copy_(value)


def relative_errors(result: StepResult, reference: StepResult) -> dict[str, float]:
    """‖a - b‖ / ‖b - before‖ of every tensor, as "group name"; infinite where a is not finite.

    The denominator is what the step has changed. Rounding of the stored value and a small share of the whole group's
    change are added to it, so that tensors which should not change are not compared by their rounding errors.
    """
    errors: dict[str, float] = {}
    for group, expected in reference.after.items():
        actual, before = result.after[group], reference.before[group]
        numbers = torch.stack(
            [
                torch.stack(
                    [
                        torch.linalg.vector_norm(actual[name].float() - tensor.float()),
                        torch.linalg.vector_norm(tensor.float() - before[name].float()),
                        torch.linalg.vector_norm(tensor.float()),
                    ]
                )
                for name, tensor in expected.items()
            ]
        ).tolist()
        sizes = [tensor.numel() for tensor in expected.values()]
        whole = math.sqrt(sum(change * change for _, change, _ in numbers))
        for name, size, (difference, change, value) in zip(expected, sizes, numbers, strict=True):
            share = _GROUP_SHARE * whole * math.sqrt(size / sum(sizes))
            error = difference / (change + share + 4 * _ULP * value + 1e-30)
            errors[f"{group} {name}".strip()] = error if math.isfinite(error) else math.inf
    return errors


def perturb(step: TrainStep) -> None:
    """Change every weight by about one unit in the last place: what that changes is the effect of rounding."""
    generator = torch.Generator().manual_seed(0)
    for flat in (step.query, step.key):
        sign = torch.randint(0, 2, flat.values.shape, generator=generator).mul_(2).sub_(1)
        flat.values.mul_(1 + _ULP * sign.to(flat.values))


def _groups(step: TrainStep, loss: float) -> dict[str, Named]:
    optimizer = {
        name if len(step.update.state()) > 1 else "": step.query.named(buffer.clone())
        for name, buffer in step.update.state().items()
    }
    gradient = {f"{prefix} {name}".strip(): t for prefix, named in optimizer.items() for name, t in named.items()}
    statistics = {
        f"{encoder} {slot.name}": slot.view(values)
        for encoder, flat in (("query", step.query), ("key", step.key))
        for values in [flat.buffers.clone()]
        for slot in flat.buffer_slots
    }
    groups = {
        "loss": {"": torch.tensor([loss], device=step.device)},
        "gradient": gradient,
        "query": step.query.named(step.query.values.clone()),
        "key": step.key.named(step.key.values.clone()),
        "statistics": statistics,
        step.dictionary.NAME: {
            name: tensor.clone() for name, tensor in step.dictionary.state_dict().items() if tensor.is_floating_point()
        },
    }
    return {group: tensors for group, tensors in groups.items() if tensors}
