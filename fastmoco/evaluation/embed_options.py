"""Options of `fastmoco embed`, validated before any file is read. Imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastmoco.config.arguments import parse
from fastmoco.config.checks import require
from fastmoco.config.flags import is_number
from fastmoco.errors import ConfigError
from fastmoco.evaluation.extraction_options import ExtractionOptions
from fastmoco.model.architectures import check_wanted
from pipelines.errors import how_to_install
from pipelines.files import absolute

DESCRIPTION = (
    "Write the features of every image, with their paths and labels, as Parquet or NumPy. With --neighbours also the "
    "nearest images of each, with --duplicates groups of near-duplicates, in files beside it."
)
SUFFIXES = (".parquet", ".npz", ".npy")
DUPLICATE_COSINE = 0.98


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(ExtractionOptions):
    """Images, backbone and output file."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folders of images, list files, tar archives, a .beton, or a name such as cifar10."""
    backbone: str
    """Folder of a run, or a file with a backbone in it: a checkpoint of any trainer, a state dict."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """File to write: .parquet (uv sync --inexact --extra parquet), .npz, or .npy with the paths in a .csv beside it."""
    normalize: bool = False
    """Scale every feature to length 1, so that inner products are cosine similarities."""
    neighbours: int | None = None
    """Write as many nearest images of each to FILE.neighbours, with their cosine similarity."""
    duplicates: Annotated[float | None, tyro.conf.arg(metavar="COSINE")] = None
    """Write groups of images of at least this cosine similarity to FILE.duplicates.csv (without a value: 0.98)."""
    overwrite: bool = False
    """Replace files of these names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ConfigError("DATA is missing: expected a folder of images, a list file or the name of a data set")
        for name in ("backbone", "out"):
            require(self, name, lambda v: v != "" and "\0" not in v, "a path")
        require(self, "out", lambda v: v.lower().endswith(SUFFIXES), "a name that ends with .parquet, .npz or .npy")
        require(self, "neighbours", lambda v: v >= 1, "1 or more")
        require(self, "duplicates", lambda v: 0 < v <= 1, "a cosine similarity above 0 and at most 1")

    @property
    def path(self) -> Path:
        """Of the file to write, absolute."""
        return Path(absolute(self.out))

    @property
    def beside(self) -> dict[str, Path]:
        """The other files: `paths` of a .npy, `neighbours` and `duplicates`, as far as they are asked for."""
        path, files = self.path, {}
        if path.suffix.lower() == ".npy":
            files["paths"] = path.with_suffix(".csv")
        if self.neighbours is not None:
            kind = ".parquet" if path.suffix.lower() == ".parquet" else ".npz"
            files["neighbours"] = path.with_suffix(f".neighbours{kind}")
        if self.duplicates is not None:
            files["duplicates"] = path.with_suffix(".duplicates.csv")
        return files


def parse_embed(argv: Sequence[str]) -> EmbedOptions:
    """Parse the arguments of `fastmoco embed`. Raises ConfigError; exits for --help."""
    options = parse(EmbedOptions, _with_value(argv), command="embed", description=DESCRIPTION)
    check_files(options)
    check_wanted(options.arch, options.stem, options.crop_size)
    return options


def check_files(options: EmbedOptions) -> None:
    """Raise ConfigError if a file cannot be written: a name that is taken, no such folder, no library for it."""
    path = options.path
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            f"--out {path.name}: Parquet needs pyarrow, which is not installed: {how_to_install('parquet')}, or choose "
            "a name that ends with .npz"
        )
    if not path.parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {path.parent}: make it, or choose another")
    for file in (path, *options.beside.values()):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ConfigError(f"--out: {file} is a link, a folder or a device, not a file: choose another name")
        if file.exists() and not options.overwrite:
            raise ConfigError(f"--out: {file} exists: use --overwrite to replace it, or choose another name")


def _with_value(argv: Sequence[str]) -> list[str]:
    """The arguments, with the value that `--duplicates` has alone."""
    words: list[str] = []
    for place, word in enumerate(argv):
        words.append(word)
        if word == "--duplicates" and not is_number(argv[place + 1] if place + 1 < len(argv) else ""):
            words.append(str(DUPLICATE_COSINE))
    return words
