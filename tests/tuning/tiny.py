"""A tiny run whose step takes a fraction of a second, and its first batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastmoco.config import ResolvedConfig, RunConfig
from fastmoco.run.resolve import resolve
from fastmoco.step.train_step import TrainStep
from pipelines.data.dataset import load_dataset
from pipelines.views import Views

IMAGES, BATCH, SIDE = 64, 8, 16
CPU = torch.device("cpu")


def tiny_config(**options: object) -> ResolvedConfig:
    """ResNet-18 of an eighth of the width in float32 with torch's kernels, unless `options` say otherwise."""
    values = {"arch": "resnet18", "width": 0.125, "crop_size": SIDE, "batch_size": BATCH, "moco_k": 32, "bn_splits": 2}
    values |= {"epochs": 1, "amp": "fp32", "device": "cpu", "mlp": True}
    images = load_dataset("shapes", data_root="data", limit=IMAGES, bad_images="error").train
    return resolve(RunConfig().replace(**(values | options)), images, CPU)[0]


def tiny_views(batch: int = BATCH) -> Views:
    generator = torch.Generator().manual_seed(3)

    def images() -> torch.Tensor:
        return torch.randn(batch, 3, SIDE, SIDE, generator=generator).to(memory_format=torch.channels_last)

    return Views(images(), images(), torch.randperm(batch, generator=generator), torch.arange(batch))


def _scale_loss(step: TrainStep) -> None:
    objective = step.objective
    step.objective = lambda batch, rank: 1.02 * objective(batch, rank)  # type: ignore[assignment]


def _scale_gradient(step: TrainStep) -> None:
    step.model.query.get_parameter("backbone.layer2.0.conv1.weight").register_hook(lambda grad: 1.1 * grad)


def _after_run(change: Callable[[TrainStep], object]) -> Callable[[TrainStep], None]:
    def corrupt(step: TrainStep) -> None:
        run = step.run

        def wrong(views: Views) -> None:
            run(views)
            change(step)

        step.run = wrong  # type: ignore[method-assign]

    return corrupt


FAULTS: dict[str, Callable[[TrainStep], None]] = {
    "loss": _scale_loss,
    "gradient": _scale_gradient,
    "query": _after_run(lambda step: step.query.values[:64].mul_(1.01)),
    "key": _after_run(lambda step: step.key.values[:64].mul_(1.01)),
    "statistics": _after_run(lambda step: step.query.buffers[:8].add_(0.01)),
    "queue": _after_run(lambda step: step.dictionary.state_dict()["keys"][:1].neg_()),
}
"""By the group of tensors in which an implementation is made wrong."""
