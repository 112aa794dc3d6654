"""`fastmoco views`: draw the augmented views of a seed, epoch and pipeline, or the differences of two pipelines.

B images · S side of a view in pixels
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmoco.commands.views_options import ViewsOptions
from fastmoco.config import RunConfig
from fastmoco.console import Fact, make_console, show_facts
from fastmoco.device import pick_device
from fastmoco.errors import ConfigError
from fastmoco.run.plots import comparison_grid, views_grid
from fastmoco.run.resolve import resolve
from fastmoco.run.stuck_reads import ended_by_stuck_reads
from pipelines.augment.presets import AUGMENTATIONS, Augmentation, with_scale
from pipelines.backends.select import open_pipeline, open_source
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from pipelines.views import BatchPlan

COUNT, COLUMNS, COUNT_COMPARED = 16, 4, 8


@ended_by_stuck_reads()
def views_command(options: ViewsOptions) -> None:
    """Draw the views and print a summary. Raises ConfigError, DataError, BackendMissingError and DeviceError."""
    names = options.pipelines
    dataset = load_dataset(options.data, data_root=options.data_root, bad_images="quarantine")
    device = pick_device(options.device)
    config, _ = resolve(options.config, dataset.train, device)
    assert config.augment.aug
    augmentation = AUGMENTATIONS[config.augment.aug]
    if config.augment.crop_scale_min is not None:
        augmentation = with_scale(augmentation, config.augment.crop_scale_min)
    drawn = [_draw(name, dataset.train, options, config, augmentation, device) for name in names]
    path = Path(os.path.abspath(os.path.expanduser(options.out)))
    facts = [
        Fact("data", dataset.train.describe()),
        Fact("views", f"{config.augment.crop_size} pixels, augmentation {augmentation.name}", ", ".join(names)),
        Fact("images", f"{len(drawn[0][0])} of epoch {options.epoch}, seed {options.seed}"),
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(drawn) == 1:
            views_grid(*drawn[0], augmentation.mean, augmentation.std, path, columns=COLUMNS)
        else:
            comparison_grid(names, drawn, augmentation.mean, augmentation.std, path)
            facts += _differences(drawn, augmentation)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror or error}): choose another with --out") from error
    show_facts(make_console(), "fastmoco views", [*facts, Fact("written", str(path))])


def _draw(
    name: str,
    index: ImageIndex,
    options: ViewsOptions,
    config: RunConfig,
    augmentation: Augmentation,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) float32 query and key views of the first images of the epoch, in the same order."""
    side = config.augment.crop_size
    assert side
    count = min(len(index), options.count or (COUNT if options.compare is None else COUNT_COMPARED))
    whole_index = name == "dataloader"  # has no crop source, and reads only the images of the batch
    planner_class = Planner if whole_index else _SelectedPlanner
    planner = planner_class(
        index.sizes, seed=options.seed, batch_size=count, augmentation=augmentation, shuffle_keys=False
    )
    step = options.epoch * planner.steps_per_epoch
    images = index if whole_index else index.select(planner.indices(step))
    workers = 0 if name in ("torch", "dataloader") else 1  # starting worker processes would take longer
    source = open_source(name, images, side, device, workers)
    pipeline = open_pipeline(name, images, planner, source, side, device, torch.float32, workers)
    random.seed(options.seed)  # the baseline uses Python's and torch's global generators
    torch.manual_seed(options.seed)
    try:
        views = next(iter(pipeline.views(step, step + 1)))
        return views.query.cpu(), views.key.cpu()
    finally:
        pipeline.close()


class _SelectedPlanner(Planner):
    """Plans for the selected images only, with the crops and colours they have in the whole data set."""

    def plan(self, step: int) -> BatchPlan:
        return replace(super().plan(step), indices=np.arange(self.batch_size))


def _differences(drawn: list[tuple[Tensor, Tensor]], augmentation: Augmentation) -> list[Fact]:
    """Mean and maximum difference of pixel values from 0 to 255, before normalisation."""
    std = torch.tensor(augmentation.std).view(3, 1, 1) * 255
    facts = []
    for view, a, b in zip(("query", "key"), *drawn, strict=True):
        difference = (a - b).abs() * std
        facts.append(Fact(f"{view} difference", f"mean {difference.mean():.3f}, max {difference.max():.1f}", "of 255"))
    return facts
