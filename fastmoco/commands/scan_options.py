"""What `fastmoco scan` can be asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastmoco.config.arguments import parse
from fastmoco.config.checks import check_types, require

DESCRIPTION = (
    "Read and decode every image once: sizes, formats, mean and std, duplicates, and what is wrong with each bad file. "
    "What was found is saved beside the images, or below --data-root where nothing can be written there; training then "
    "starts without opening them, and leaves out the bad ones with --bad-images quarantine."
)


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """What to scan, and where to."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, a text file of paths, or imagenette."""
    workers: int | None = None
    """Processes that decode, 0 for this one alone (None: one for every core, if there are many files)."""
    bad_images: Literal["error", "quarantine"] = "error"
    """Whether bad images are a failure (exit code 3), or left out by a training that is told to do so too."""
    out: str | None = None
    """File to save to in place of the usual one; training does not look for it there."""
    data_root: str = "~/.cache/fastmoco"
    """Where named data sets are downloaded to."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "data", lambda v: v != "" and "\0" not in v, "a folder, a list file or imagenette")
        require(self, "workers", lambda v: v >= 0, "0 or more")
        require(self, "out", lambda v: v.endswith(".npz") and "\0" not in v, "the name of a file that ends in .npz")


def parse_scan(argv: list[str]) -> ScanOptions:
    """The arguments of `fastmoco scan`. Raises ConfigError; exits for --help."""
    flags = ["--" + name.replace("_", "-") for name in ScanOptions.__dataclass_fields__ if name != "data"]
    return parse(ScanOptions, argv, command="scan", description=DESCRIPTION, flags=flags)
