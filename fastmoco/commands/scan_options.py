"""Options of `fastmoco scan`, validated before any file is read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastmoco.config.arguments import parse
from fastmoco.config.checks import check_types, require

DESCRIPTION = (
    "Decode every image once: sizes, formats, mean and std, duplicates, and the reason why each bad file is bad. "
    "Results are saved beside the images, or below --data-root if that folder is read-only. Training then starts "
    "without opening the images, and with --bad-images quarantine skips the bad ones."
)


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """Data set to scan, and output file."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of images, text file of paths, or imagenette."""
    workers: int | None = None
    """Worker processes that decode, 0 for the main process (None: one per core if there are many files)."""
    bad_images: Literal["error", "quarantine"] = "error"
    """Bad images are an error (exit code 3), or will be skipped by training with the same flag."""
    out: str | None = None
    """Output file (.npz) instead of the default one; training will not use it."""
    data_root: str = "~/.cache/fastmoco"
    """Folder for downloaded data sets and caches."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "data", lambda v: v != "" and "\0" not in v, "a folder, a text file of paths or imagenette")
        require(self, "workers", lambda v: v >= 0, "0 or more")
        require(self, "out", lambda v: v.endswith(".npz") and "\0" not in v, "the name of an .npz file")


def parse_scan(argv: list[str]) -> ScanOptions:
    """Parse the arguments of `fastmoco scan`. Raises ConfigError; exits for --help."""
    flags = ["--" + name.replace("_", "-") for name in ScanOptions.__dataclass_fields__ if name != "data"]
    return parse(ScanOptions, argv, command="scan", description=DESCRIPTION, flags=flags)
