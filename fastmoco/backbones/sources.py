"""The files that a backbone is read from: which one of a run, in which format, and what it says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from fastmoco.backbones.description import RECORD, Description, from_config, from_record
from fastmoco.backbones.tensor_files import TensorFile, safetensors_file
from fastmoco.backbones.torch_files import PICKLE, ZIP, read_torch
from fastmoco.errors import CheckpointError, ConfigError
from fastmoco.registry import ARCHITECTURES
from fastmoco.run import checkpoint
from fastmoco.run.checkpoint_meta import CheckpointMeta
from fastmoco.run.directory import read_config, read_status
from fastmoco.run.sealed import SEAL, check_seal
from pipelines.data.decode import printable

_SUFFIXES = {".safetensors", ".pth", ".pt", ".ckpt", ".tar", ".bin", ".pkl"}  # of files with weights
_CHECKPOINT_PREFIXES = ("model.query.backbone.", "model.key.backbone.")


class Source(NamedTuple):
    """A file of tensors.

    own     prefixes below which there are backbones and nothing else, in our files; empty for those of others
    origin  where it is from, for people
    """

    file: TensorFile
    said: Description
    own: Sequence[str]
    origin: str


def open_source(path: Path) -> Source:
    """The file at a path, or of a run's folder its newest checkpoint that verifies, else its backbone.safetensors.

    Raises CheckpointError where there is nothing, or something damaged or in another format, and ConfigError for a
    folder that is no run.
    """
    if path.is_dir():
        return _open_run(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no file or folder {printable(str(path))}: expected a run or a checkpoint of a backbone"
        )
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{printable(str(path))} cannot be read ({error.strerror or error})") from error
    if head[8:9] == b"{":
        return _open_safetensors(path)
    if head.startswith((ZIP, PICKLE)):
        return _open_torch(path)
    raise CheckpointError(
        f"{printable(str(path))} begins with {head!r}, expected a safetensors file or one of torch.save"
    )


def _open_run(path: Path) -> Source:
    try:
        said = from_config(read_config(path).flat(), str(path), _steps(path))
    except ConfigError:
        if files := sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES):
            shown = ", ".join(printable(name[:80]) for name in files[:3])
            raise ConfigError(
                f"{printable(str(path))} is not the folder of a run: name a file in it ({shown})"
            ) from None
        raise
    newest, warnings = checkpoint.newest(path / "checkpoints")
    if newest is not None:
        source = _open_safetensors(newest)
        damaged = f" ({len(warnings)} newer damaged)" if warnings else ""
        return source._replace(origin=source.origin + damaged)
    if not (path / "backbone.safetensors").is_file():
        raise CheckpointError(f"the run in {printable(str(path))} has no checkpoint and no backbone.safetensors yet")
    return _open_safetensors(path / "backbone.safetensors")._replace(said=said)


def _steps(run: Path) -> int:
    """Steps of a run, at the end of which its backbone.safetensors is written; 0 if its status does not tell."""
    try:
        return read_status(run)["step"]
    except ConfigError:
        return 0


def _open_safetensors(path: Path) -> Source:
    origin = printable(str(path))
    try:
        file = safetensors_file(str(path))
        if SEAL in file.texts:
            check_seal(file.load(file.shapes), file.texts, origin)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{origin} cannot be read ({reason}): it is damaged, or no safetensors file") from error
    if "meta" in file.texts:
        meta = CheckpointMeta.of(path, checkpoint.verify(path))
        said = from_config(meta.config.flat(), origin, meta.step)
        return Source(_dotted(file), said, _CHECKPOINT_PREFIXES, origin)
    if RECORD in file.texts:
        return Source(file, from_record(file.texts[RECORD], origin), ("",), origin)
    if path.name == "backbone.safetensors" and (path.parent / "config.json").is_file():
        said = from_config(read_config(path.parent).flat(), origin, _steps(path.parent))
        return Source(file, said, ("",), origin)
    return Source(file, Description(), (), origin)


def _dotted(file: TensorFile) -> TensorFile:
    """A checkpoint of a run with model.query.* for model/query.*, so that prefixes are chosen as in other files."""
    names = {name.replace("/", "."): name for name in file.shapes}

    def load(wanted):
        loaded = file.load([names[name] for name in wanted])
        return {name: loaded[names[name]] for name in wanted}

    return replace(file, shapes={name: file.shapes[names[name]] for name in names}, load=load)


def _open_torch(path: Path) -> Source:
    origin, file = printable(str(path)), read_torch(path)
    said = from_record(file.texts[RECORD], origin) if RECORD in file.texts else Description()
    arch = file.texts.get("arch")
    return Source(file, replace(said, arch=arch if arch in ARCHITECTURES else None), (), origin)
