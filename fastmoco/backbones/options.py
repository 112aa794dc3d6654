"""What `fastmoco export` can be asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastmoco.config.arguments import parse
from fastmoco.config.checks import check_types, require
from fastmoco.config.choices import ExportTo
from fastmoco.config.resume import run_of
from fastmoco.errors import ConfigError
from fastmoco.registry import EXPORT_TARGETS
from pipelines.files import absolute

DESCRIPTION = (
    "Write the backbone of a run, without its projection head, for another library. The file is loaded back, by that "
    "library where it is installed, and its features are compared before it gets its name."
)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which backbone, for whom, and where to."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """The folder of a run, or a file with a ResNet in it: a checkpoint of any trainer, a state dict."""
    to: ExportTo
    """The library or format; lincls is main_lincls.py of facebookresearch/moco."""
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """The file to write (None: NAME-LIBRARY in the folder of the run NAME, or beside another file)."""
    prefix: str | None = None
    """Which of several backbones in the file: part of their tensors' names, e.g. teacher (None: the query encoder)."""
    overwrite: bool = False
    """Replace that file."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "run", lambda v: v != "" and "\0" not in v, "the folder of a run, or a file")
        require(self, "prefix", lambda v: v.strip(".") != "", "part of the names of tensors")
        require(self, "out", lambda v: v != "" and "\0" not in v, "the name of a file")

    @property
    def path(self) -> Path:
        """Of the file to write, absolute."""
        return default_path(self.run, self.to) if self.out is None else Path(absolute(self.out))


def default_path(run: str, target: str) -> Path:
    """`RUN/RUN-timm.pth` for a run or one of its checkpoints, `backbone-timm.pth` beside a file `backbone.ckpt`."""
    path, suffix = Path(absolute(run)), EXPORT_TARGETS[target].suffixes[0]
    folder = run_of(path) or (path if path.is_dir() else None)
    name, folder = (path.name.split(".")[0], path.parent) if folder is None else (folder.name, folder)
    return folder / f"{name or 'backbone'}-{target}{suffix}"


def parse_export(argv: list[str]) -> ExportOptions:
    """The arguments of `fastmoco export`. Raises ConfigError; exits for --help."""
    options = parse(ExportOptions, argv, command="export", description=DESCRIPTION)
    check_path(options.to, options.path, overwrite=options.overwrite)
    return options


def check_path(target: str, path: Path, *, overwrite: bool) -> None:
    """Refuse a name that `target` does not read, and what must not be replaced. Raises ConfigError."""
    if not path.name.lower().endswith(EXPORT_TARGETS[target].suffixes):
        names = " or ".join(EXPORT_TARGETS[target].suffixes)
        raise ConfigError(f"--out is {path.name!a}, expected a name that ends with {names} for --to {target}")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError(f"--out {path} is a link, a folder or a device, which is left alone: choose another name")
    if path.exists() and not overwrite:
        raise ConfigError(f"--out {path} exists: use --overwrite to replace it, or choose another name")
