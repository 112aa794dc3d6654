"""What `fastmoco views` can be asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from fastmoco.config import RunConfig
from fastmoco.config.arguments import parse
from fastmoco.config.checks import check_types, require
from fastmoco.config.choices import Aug, Pipeline
from fastmoco.errors import ConfigError

DESCRIPTION = (
    "Draw the query and the key views of the first images of an epoch, as a run with the same seed sees them. With "
    "--compare, what two pipelines make of the same images, and how far they are apart."
)


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
    pipeline: Pipeline = "torch"
    """What crops and augments; dataloader draws its own random numbers."""
    compare: str | None = None
    """Two pipelines to compare, as in torch,resident, in place of --pipeline."""
    aug: Aug | None = None
    """Augmentation of MoCo v1, of v2, of the authors' CIFAR demo, or of BYOL (None: from the data)."""
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
        _ = self.pipelines, self.config

    @property
    def pipelines(self) -> list[str]:
        """The pipeline to draw with, or the two to compare."""
        if self.compare is None:
            return [self.pipeline]
        names = [name.strip() for name in self.compare.split(",")]
        if len(names) != 2:
            raise ConfigError(f"--compare is {self.compare!r}, expected two pipelines, as in --compare torch,resident")
        for name in names:
            try:
                replace(self, compare=None, pipeline=name)  # type: ignore[arg-type]
            except ConfigError as error:
                raise ConfigError(str(error).replace("--pipeline", "--compare")) from None
        return names

    @property
    def config(self) -> RunConfig:
        """That of a run that sees these views."""
        names = ("data", "data_root", "seed", "aug", "crop_size", "crop_scale_min")
        return RunConfig().replace(**{name: getattr(self, name) for name in names})


def parse_views(argv: list[str]) -> ViewsOptions:
    """The arguments of `fastmoco views`. Raises ConfigError; exits for --help."""
    flags = ["--" + name.replace("_", "-") for name in ViewsOptions.__dataclass_fields__ if name != "data"]
    return parse(ViewsOptions, argv, command="views", description=DESCRIPTION, flags=flags)
