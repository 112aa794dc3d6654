"""`fastmoco views`: draw the augmented views of a seed, epoch and pipeline, or the differences of two pipelines.

B images · S side of a view in pixels
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmoco.commands.views_options import ViewsOptions
from fastmoco.config import RunConfig
from fastmoco.config.augment import augmentation_of, describe
from fastmoco.console import Fact, make_console, show_result
from fastmoco.device import pick_device
from fastmoco.errors import cannot_write
from fastmoco.run.data_facts import data_facts
from fastmoco.run.loading import load_reported
from fastmoco.run.outside import check_picture
from fastmoco.run.plots import comparison_grid, views_grid
from fastmoco.run.resolve import resolve
from fastmoco.run.stuck_reads import ended_by_stuck_reads
from pipelines.augment.presets import Augmentation
from pipelines.backends.select import open_pipeline, open_source
from pipelines.data.index import ImageIndex
from pipelines.files import absolute
from pipelines.plan.planner import Planner
from pipelines.views import BatchPlan

COUNT, COLUMNS, COUNT_COMPARED = 16, 4, 8


@ended_by_stuck_reads()
def views_command(options: ViewsOptions) -> None:
    """Draw the views and print a summary.

    Raises ConfigError, DataError, CheckpointError for a full disk, BackendMissingError and DeviceError.
    """
    names, console = options.pipelines, make_console()
    path = Path(absolute(options.out))
    check_picture(path, options.data)
    dataset = load_reported(options, console)
    device = pick_device(options.device)
    config, _ = resolve(options.config, dataset.train, device)
    augmentation = augmentation_of(config.augment, config.data.channels)
    drawn = [_draw(name, dataset.train, options, config, augmentation, device) for name in names]
    facts = [
        *data_facts(dataset)[:-1],
        Fact(
            "views",
            f"{config.augment.crop_size} pixels, {describe(config.augment, config.data.channels)}",
            ", ".join(names),
        ),
        Fact("images", f"{len(drawn[0][0])} of epoch {options.epoch}, seed {options.seed}"),
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(drawn) == 1:
            query, key, originals = drawn[0]
            views_grid(query, key, augmentation.mean, augmentation.std, path, COLUMNS, originals)
        else:
            pairs = [(query, key) for query, key, _ in drawn]
            comparison_grid(names, pairs, augmentation.mean, augmentation.std, path)
            facts += _differences(pairs, augmentation)
    except OSError as error:
        raise cannot_write(path, error) from error
    show_result(console, "fastmoco views", [*facts, Fact("written", str(path))], out=str(path), images=len(drawn[0][0]))


def _draw(
    name: str,
    index: ImageIndex,
    options: ViewsOptions,
    config: RunConfig,
    augmentation: Augmentation,
    device: torch.device,
) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """(B, C, S, S) float32 query and key views of the first images of the epoch, and the images, in one order."""
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
        return views.query.cpu(), views.key.cpu(), [images.read(i) for i in views.index.tolist()]
    finally:
        pipeline.close()


class _SelectedPlanner(Planner):
    """Plans for the selected images only, with the crops and colours they have in the whole data set."""

    def plan(self, step: int) -> BatchPlan:
        return replace(super().plan(step), indices=np.arange(self.batch_size))


def _differences(drawn: list[tuple[Tensor, Tensor]], augmentation: Augmentation) -> list[Fact]:
    """Mean and maximum difference of pixel values from 0 to 255, before normalisation."""
    std = torch.tensor(augmentation.std).view(-1, 1, 1) * 255
    facts = []
    for view, a, b in zip(("query", "key"), *drawn, strict=True):
        difference = (a - b).abs() * std
        facts.append(Fact(f"{view} difference", f"mean {difference.mean():.3f}, max {difference.max():.1f}", "of 255"))
    return facts
