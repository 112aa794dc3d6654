"""The flags that continue a run: what `--resume` with a path means, and where the other settings come from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastmoco.config.resume import rescaled, run_of
from fastmoco.config.run_config import RunConfig
from fastmoco.errors import CheckpointError, ConfigError
from pipelines.suggest import closest

_HEADER_BYTES = 100_000_000  # safetensors refuses a longer header
_CODE = (b"PK\x03\x04", b"\x80")  # of files of torch.save: a zip archive, or a pickle
_PLAN = ("--schedule", "--cos", "--no-cos")  # flags that say what the learning rate is to be


def without_path(argv: list[str]) -> list[str]:
    """The arguments, with `--resume PATH` as other flags: `--resume --out RUN`, or `--resume-from PATH`.

    A run, or its newest checkpoint, goes on in its own folder unless --out names another one. Raises ConfigError.
    """
    position, path = _resume_path(argv)
    if path is None:
        return argv
    rest = argv[:position] + argv[position + (1 if "=" in argv[position] else 2) :]
    out = value_of(argv, "--out")
    if not Path(path).expanduser().exists():
        raise ConfigError(f"--resume {path} does not exist, expected a run or a checkpoint{_similar(Path(path))}")
    run = run_of(Path(path).expanduser())
    if run is None or (out is not None and not _same(run, Path(out).expanduser())):
        return [*rest, "--resume-from", path]
    newest = max((run / "checkpoints").glob("step-*.safetensors"), default=None, key=lambda file: file.name)
    if Path(path).is_file() and newest is not None and newest.name != Path(path).name:
        raise ConfigError(
            f"--resume {path} is not the newest checkpoint of {run}, whose later steps would be lost: use --resume "
            f"{run} to go on from {newest.name}, or another --out to go on from this one in a new run"
        )
    return [*rest, "--resume", *([] if out is not None else ["--out", str(run)])]


def saved_config(argv: list[str]) -> RunConfig | None:
    """The settings of the run that the arguments continue, from its config.json or from a checkpoint; None if none.

    Raises ConfigError or CheckpointError.
    """
    out, source = value_of(argv, "--out"), value_of(argv, "--resume-from")
    if "--resume" in argv:
        path = None if out is None else Path(out).expanduser() / "config.json"
        return read_config_file(path) if path is not None and path.is_file() else None
    if source is None:
        return None
    run = run_of(Path(source).expanduser())
    config = _of_checkpoint(Path(source).expanduser()) if run is None else read_config_file(run / "config.json")
    return config.replace(out=None)


def replanned(config: RunConfig, saved: RunConfig, argv: list[str]) -> RunConfig:
    """The configuration with the milestones of the learning rate at the same fractions of another number of epochs.

    Not if the arguments say what the learning rate is to be.
    """
    before, after, schedule = saved.optim.epochs, config.optim.epochs, saved.optim.schedule
    given = any(argument.split("=")[0] in _PLAN for argument in argv)
    if given or schedule is None or before is None or after is None or before == after:
        return config
    return config.replace(schedule=rescaled(schedule, before, after))


def read_config_file(path: Path) -> RunConfig:
    """The configuration in a JSON file, such as the config.json of a run. Raises ConfigError."""
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error}): expected the JSON of a run's config.json"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def value_of(argv: list[str], flag: str) -> str | None:
    """The value of `flag VALUE` or `flag=VALUE`, the last one; None if it is absent."""
    found = None
    for argument, following in zip(argv, [*argv[1:], None], strict=False):
        if argument == flag:
            found = following
        elif argument.startswith(flag + "="):
            found = argument.removeprefix(flag + "=")
    return found


def _resume_path(argv: list[str]) -> tuple[int, str | None]:
    """The position of `--resume`, and the path given with it."""
    for position, argument in enumerate(argv):
        if argument.startswith("--resume="):
            return position, argument.removeprefix("--resume=")
        if argument == "--resume":
            following = argv[position + 1] if position + 1 < len(argv) else "-"
            return position, None if following.startswith("-") else following
    return 0, None


def _similar(path: Path) -> str:
    """`; did you mean ...?` with the closest name in the folder of a path that does not exist."""
    try:
        match = closest(path.name, os.listdir(path.expanduser().parent), cutoff=0.5)
    except OSError:
        return ""
    return "" if match is None else f"; did you mean {path.parent / match}?"


def _same(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _of_checkpoint(path: Path) -> RunConfig:
    """The settings in a checkpoint that is in no run."""
    expected = "expected a run of fastmoco or one of its step-….safetensors"
    if path.is_dir():
        raise ConfigError(f"--resume-from {path} has no config.json and checkpoints/: {expected}")
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if head.startswith(_CODE):
                raise CheckpointError(
                    f"{path} is a file of torch.save, whose queue and optimiser cannot be resumed here: use --init "
                    f"{path} to start a new run from its weights"
                )
            length = int.from_bytes(head, "little")
            text = file.read(length) if 8 < length <= _HEADER_BYTES else b""
    except OSError as error:
        raise ConfigError(f"--resume-from {path} cannot be read ({error.strerror}): {expected}") from error
    try:
        settings = json.loads(json.loads(text)["__metadata__"]["meta"])["config"]
        return RunConfig().replace(**{name: _tuples(value) for name, value in settings.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say what it was trained with ({error!r:.80}): {expected}") from None


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
