"""fastmoco views: a picture of the views that a seed, an epoch and a pipeline make, or of how two pipelines differ.

B images · S side of a view in pixels
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from fastmoco.arguments import parse
from fastmoco.config import RunConfig
from fastmoco.config_checks import check_types, require
from fastmoco.console import Fact, make_console, show_facts
from fastmoco.device import pick_device
from fastmoco.errors import ConfigError
from fastmoco.pictures import comparison_grid, views_grid
from fastmoco.resolve import resolve
from pipelines.augment import AUGMENTATIONS, Augmentation, with_scale
from pipelines.backends import open_pipeline, open_source
from pipelines.dataset import load_dataset
from pipelines.image_index import ImageIndex
from pipelines.plans import Planner
from pipelines.views import BatchPlan

DESCRIPTION = (
    "Draw the query and the key views of the first images of an epoch, as a run with the same seed sees them. With "
    "--compare, what two pipelines make of the same images, and how far they are apart."
)
COUNT, COLUMNS, COUNT_COMPARED = 16, 4, 8


@dataclass(frozen=True, kw_only=True)
class ViewsOptions:
    """Which views to draw."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, a text file of paths, or a name: shapes, cifar10, ..."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "views.png"
    """The picture to write."""
    seed: int = 0
    """Seed of the run."""
    epoch: int = 0
    """Epoch of the run, from 0."""
    pipeline: Literal["resident", "torch", "dali", "ffcv", "dataloader"] = "torch"
    """What crops and augments; dataloader draws its own random numbers."""
    compare: str | None = None
    """Two pipelines to compare, as in torch,resident, in place of --pipeline."""
    aug: Literal["v1", "v2", "cifar"] | None = None
    """Augmentation of MoCo v1, of v2, or of the authors' CIFAR demo (None: from the data)."""
    crop_size: int | None = None
    """Side of a view in pixels (None: from the data)."""
    crop_scale_min: float | None = None
    """Smallest area of a random crop, as a fraction of the image (None: of the augmentation)."""
    count: int | None = None
    """Images to draw (None: 16, or 8 to compare)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to augment."""
    data_root: str = "~/.cache/fastmoco"
    """Where named data sets are downloaded to."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "out", lambda v: v.lower().endswith(".png") and "\0" not in v, "the name of a .png file")
        require(self, "epoch", lambda v: 0 <= v < 2**31, "0 or more")
        require(self, "count", lambda v: 1 <= v <= 256, "1 to 256")


def views_command(argv: list[str]) -> None:
    """Draws, and says what was drawn. Raises ConfigError, DataError, BackendMissingError and DeviceError."""
    flags = ["--" + name.replace("_", "-") for name in ViewsOptions.__dataclass_fields__ if name != "data"]
    options = parse(ViewsOptions, argv, command="views", description=DESCRIPTION, flags=flags)
    names = _pipelines(options)
    settings = {name: getattr(options, name) for name in ("data", "data_root", "seed", "aug", "crop_size")}
    config = RunConfig().replace(**settings, crop_scale_min=options.crop_scale_min)
    dataset = load_dataset(options.data, data_root=options.data_root, bad_images="quarantine")
    device = pick_device(options.device)
    config, _ = resolve(config, dataset.train, device)
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


def _pipelines(options: ViewsOptions) -> list[str]:
    if options.compare is None:
        return [options.pipeline]
    names = [name.strip() for name in options.compare.split(",")]
    if len(names) != 2:
        raise ConfigError(f"--compare is {options.compare!r}, expected two pipelines, as in --compare torch,resident")
    for name in names:
        try:
            replace(options, pipeline=name)  # type: ignore[arg-type]
        except ConfigError as error:
            raise ConfigError(str(error).replace("--pipeline", "--compare")) from None
    return names


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
    reads_all = name == "dataloader"  # it has no crop source; what it does not draw, it does not read
    kind = Planner if reads_all else _ChosenPlanner
    planner = kind(index.sizes, seed=options.seed, batch_size=count, augmentation=augmentation, shuffle_keys=False)
    step = options.epoch * planner.steps_per_epoch
    images = index if reads_all else index.select(planner.indices(step))
    workers = 0 if name in ("torch", "dataloader") else 1  # processes take longer to start than this takes
    source = open_source(name, images, side, device, workers)
    pipeline = open_pipeline(name, images, planner, source, side, device, torch.float32, workers)
    random.seed(options.seed)  # the control draws its own numbers, of both kinds
    torch.manual_seed(options.seed)
    try:
        views = next(iter(pipeline.views(step, step + 1)))
        return views.query.cpu(), views.key.cpu()
    finally:
        pipeline.close()


class _ChosenPlanner(Planner):
    """Plans for the chosen images alone, cropped and coloured as in the whole data set, which need not be decoded."""

    def plan(self, step: int) -> BatchPlan:
        return replace(super().plan(step), indices=np.arange(self.batch_size))


def _differences(drawn: list[tuple[Tensor, Tensor]], augmentation: Augmentation) -> list[Fact]:
    """Of pixel values from 0 to 255, before normalisation."""
    std = torch.tensor(augmentation.std).view(3, 1, 1) * 255
    facts = []
    for view, a, b in zip(("query", "key"), *drawn, strict=True):
        apart = (a - b).abs() * std
        facts.append(Fact(f"{view} apart", f"{apart.mean():.3f} on average, {apart.max():.1f} at most", "of 255"))
    return facts
