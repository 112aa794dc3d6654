"""Options of `fastmoco report`, validated before any file is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastmoco.config.arguments import parse
from fastmoco.config.checks import check_types, require
from fastmoco.errors import ConfigError
from pipelines.files import absolute

DESCRIPTION = (
    "Write one HTML page on a run: data, settings, curves, views, evaluation and the commands to go on with; with "
    "several runs, a comparison. It is self-contained, and can be written at any time, also while the run trains."
)
FILE_NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Which runs, and where to."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folders of runs."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The page to write (None: report.html in the run, or of several beside them)."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.runs:
            raise ConfigError("RUN is missing: expected the folder of a run, such as runs/NAME")
        if any(run == "" or "\0" in run for run in self.runs):
            raise ConfigError("RUN is empty: expected the folder of a run, such as runs/NAME")
        require(self, "out", lambda v: v.lower().endswith((".html", ".htm")) and "\0" not in v, "the name of a .html")

    @property
    def folders(self) -> list[Path]:
        """Of the runs, absolute, each once."""
        return list(dict.fromkeys(Path(absolute(run)) for run in self.runs))

    @property
    def path(self) -> Path:
        """Of the page, absolute."""
        if self.out is not None:
            return Path(absolute(self.out))
        if len(self.folders) == 1:
            return self.folders[0] / FILE_NAME
        try:
            return Path(os.path.commonpath([folder.parent for folder in self.folders])) / FILE_NAME
        except ValueError:  # on several drives
            return Path.cwd() / FILE_NAME


def parse_report(argv: list[str]) -> ReportOptions:
    """Parse the arguments of `fastmoco report`. Raises ConfigError; exits for --help."""
    return parse(ReportOptions, argv, command="report", description=DESCRIPTION)
