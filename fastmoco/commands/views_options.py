"""Options of `fastmoco views`, validated before any file is read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import tyro

from fastmoco.config import AugmentConfig, ImagesConfig, RunConfig
from fastmoco.config.arguments import parse
from fastmoco.config.checks import require
from fastmoco.config.choices import Pipeline
from fastmoco.errors import ConfigError

DESCRIPTION = (
    "Draw the query and key views of the first images of an epoch, identical to those of a run with the same seed. "
    "With --compare, draw the views of two pipelines and their differences."
)


@dataclass(frozen=True, kw_only=True)
class ViewsOptions(ImagesConfig):
    """Views to draw."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folders of images, list files, tar archives, a .beton, or a name: shapes, cifar10, ..."""
    bad_images: Literal["error", "quarantine"] = "quarantine"
    """Unreadable images: stop with an error, or leave them out."""
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
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    count: int | None = None
    """Number of images (None: 16, or 8 with --compare)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device (auto: cuda if available)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ConfigError("DATA is missing: expected a folder of images, a list file or the name of a data set")
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
        names = (*ImagesConfig.__dataclass_fields__, "seed")
        given = RunConfig().replace(**{name: getattr(self, name) for name in names})
        return replace(given, augment=self.augment)


def parse_views(argv: list[str]) -> ViewsOptions:
    """Parse the arguments of `fastmoco views`. Raises ConfigError; exits for --help."""
    return parse(ViewsOptions, argv, command="views", description=DESCRIPTION)
