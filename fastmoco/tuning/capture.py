"""The training step as a CUDA graph on every rank, or on none."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastmoco.distributed.world import World
from fastmoco.errors import ConfigError
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views


def captured(
    step: TrainStep,
    views: Views,
    world: World,
    required: bool,
    graph: Callable[[TrainStep, Views], GraphedStep] = GraphedStep,
) -> tuple[GraphedStep | TrainStep, str | None]:
    """(captured step, None), or (the step itself, why some rank cannot capture it). All ranks call it together.

    With several ranks this is the first capture of their collectives: each rank has compared its step on its own.

    required  whether a capture that fails is an error

    Raises ConfigError if it is.
    """
    found, failure = None, None
    try:
        found = graph(step, views)
    except ConfigError as error:
        if required:
            raise
        failure = str(error)
    if world.size > 1:
        failed = torch.tensor([float(failure is not None)], device=world.device)
        if world.all_reduce(failed).wait().item() and failure is None:
            failure = "it cannot be captured on another device"
    return (step, failure) if found is None or failure is not None else (found, None)
