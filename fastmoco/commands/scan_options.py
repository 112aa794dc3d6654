"""Options of `fastmoco scan`, validated before any file is read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from fastmoco.config.arguments import parse
from fastmoco.config.checks import require
from fastmoco.config.data import ImagesConfig
from fastmoco.errors import ConfigError

DESCRIPTION = (
    "Decode every image once: sizes, formats, mean and std, duplicates, and the reason why each bad file is bad. "
    "Results are saved beside the images, or below --data-root if that folder is read-only. Training then starts "
    "without opening the images, and with --bad-images quarantine skips the bad ones."
)


@dataclass(frozen=True, kw_only=True)
class ScanOptions(ImagesConfig):
    """Data sets to scan, and output file."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folders of images, list files, or imagenette."""
    workers: int | None = None
    """Worker processes that decode, 0 for the main process (None: one per core if there are many files)."""
    out: str | None = None
    """Output file (.npz); training does not use it (None: beside the images, which training does use)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ConfigError("DATA is missing: expected a folder of images, a list file or imagenette")
        if self.out is not None and len(self.data) > 1:
            raise ConfigError(f"--out names one file, and {len(self.data)} data sets are scanned: leave it out")
        require(self, "workers", lambda v: v >= 0, "0 or more")
        require(self, "out", lambda v: v.endswith(".npz") and "\0" not in v, "the name of an .npz file")


def parse_scan(argv: list[str]) -> ScanOptions:
    """Parse the arguments of `fastmoco scan`. Raises ConfigError; exits for --help."""
    return parse(ScanOptions, argv, command="scan", description=DESCRIPTION)
