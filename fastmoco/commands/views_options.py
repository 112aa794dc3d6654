"""Options of `fastmoco views`, validated before any file is read. Imports no torch."""

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
    "Draw the query and key views of the first images of an epoch, identical to those of a run with the same seed. "
    "With --compare, draw the views of two pipelines and their differences."
)


@dataclass(frozen=True, kw_only=True)
class ViewsOptions:
    """Views to draw."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of images, text file of paths, or a name: shapes, cifar10, ..."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "views.png"
    """Output file (.png)."""
    seed: int = 0
    """Seed of the run."""
    epoch: int = 0
    """Epoch of the run, from 0."""
    pipeline: Pipeline = "torch"
    """Data pipeline; dataloader uses random numbers of its own."""
    compare: str | None = None
    """Two pipelines to compare instead of --pipeline, e.g. torch,resident."""
    aug: Aug | None = None
    """Augmentation of MoCo v1, of v2, of the authors' CIFAR demo, or of BYOL (None: from the data)."""
    crop_size: int | None = None
    """Side of a view in pixels (None: from the data)."""
    crop_scale_min: float | None = None
    """Minimum area of a random crop, as a fraction of the image (None: that of the augmentation)."""
    count: int | None = None
    """Number of images (None: 16, or 8 with --compare)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device."""
    data_root: str = "~/.cache/fastmoco"
    """Folder for downloaded data sets and caches."""

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
            raise ConfigError(f"--compare is {self.compare!r}, expected two pipelines, e.g. --compare torch,resident")
        for name in names:
            try:
                replace(self, compare=None, pipeline=name)  # type: ignore[arg-type]
            except ConfigError as error:
                raise ConfigError(str(error).replace("--pipeline", "--compare")) from None
        return names

    @property
    def config(self) -> RunConfig:
        """Configuration of a run with these views."""
        names = ("data", "data_root", "seed", "aug", "crop_size", "crop_scale_min")
        return RunConfig().replace(**{name: getattr(self, name) for name in names})


def parse_views(argv: list[str]) -> ViewsOptions:
    """Parse the arguments of `fastmoco views`. Raises ConfigError; exits for --help."""
    flags = ["--" + name.replace("_", "-") for name in ViewsOptions.__dataclass_fields__ if name != "data"]
    return parse(ViewsOptions, argv, command="views", description=DESCRIPTION, flags=flags)
