"""Options of `fastmoco watch`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from fastmoco.config.arguments import parse
from fastmoco.config.checks import check_types, require

DESCRIPTION = (
    "Follow a run from another terminal, or list all runs in a folder: loss beside its chance level, kNN accuracy, "
    "speed, time left. Reads the files of the run and changes nothing; waits for a run that has not begun, and ends "
    "with the run and its exit code."
)


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """What to follow."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = "runs"
    """Folder of a run, or of several, which are listed."""
    once: bool = False
    """Print the state now, and end."""
    interval: float = 2.0
    """Seconds between looks at the files."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "run", lambda v: v != "" and "\0" not in v, "a folder")
        require(self, "interval", lambda v: 0.1 <= v <= 3600, "0.1 to 3600 seconds")


def parse_watch(argv: list[str]) -> WatchOptions:
    """Parse the arguments of `fastmoco watch`. Raises ConfigError; exits for --help."""
    return parse(WatchOptions, argv, command="watch", description=DESCRIPTION)
