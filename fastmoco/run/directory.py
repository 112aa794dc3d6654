"""The folder of a run: its lock, the paths in it, and the status that other programs read.

config.json           the resolved configuration
status.json           state, exit code, message, step, epoch, commit, versions; replaced atomically
metrics.jsonl  tb/    see metrics.py
checkpoints/          see checkpoint.py
data.npz              see data_record.py; for images in files
views.png curves.png backbone.safetensors
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastmoco.config import RunConfig
from fastmoco.errors import CheckpointError, ConfigError, ExitCode
from fastmoco.run.environment import git_commit, versions
from fastmoco.run.metrics import FILE_NAME as METRICS_NAME
from pipelines.files import write_atomically
from pipelines.platforms import lock

_LOCK = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """The open folder of a run, locked until this process exits or calls `close`."""

    path: Path
    lock: int

    @classmethod
    def open(cls, path: Path, *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
        """Create the folder of a new run, or open an existing one to resume or to overwrite its run.

        Raises ConfigError if it is not a folder, not writable, in use by another process, not empty without `resume` or
        `overwrite`, has no run to resume, or is to be overwritten and is not recognisably a run; CheckpointError if the
        run to resume has no checkpoint.
        """
        path = Path(os.path.abspath(path.expanduser()))
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(f"{path} is a file, expected a folder for the run: choose another with --out")
            if resume:
                _check_resumable(path)
            has_content = path.is_dir() and any(entry.name != _LOCK for entry in path.iterdir())
            if has_content and not (resume or overwrite):
                raise ConfigError(f"{path} is not empty: use --resume to continue, --overwrite to replace it, or --out")
            if has_content and overwrite and (reason := _not_a_run(path)):
                raise ConfigError(f"--overwrite will not delete {path}, because {reason}: choose another with --out")
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _lock(path))
            if overwrite:
                run._delete_content()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"{path} cannot be used for the run ({reason}): choose another with --out") from error
        return run

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_NAME

    @property
    def views_png(self) -> Path:
        return self.path / "views.png"

    @property
    def curves_png(self) -> Path:
        return self.path / "curves.png"

    @property
    def backbone(self) -> Path:
        return self.path / "backbone.safetensors"

    def write_config(self, config: RunConfig) -> None:
        write_atomically(self.path / "config.json", config.to_json())

    def write_status(self, *, step: int, epoch: int, exit_code: int | None = None, message: str = "") -> None:
        """Replace status.json; no exit code means that the run is still active. Raises OSError."""
        states = {None: "running", ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted"}
        status = {
            "state": states.get(exit_code, "failed"),
            "exit_code": exit_code,
            "message": message,
            "step": step,
            "epoch": epoch,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_commit": git_commit(),
            "versions": versions(),
        }
        write_atomically(self.path / "status.json", json.dumps(status, indent=2) + "\n")

    def close(self) -> None:
        """Let another process open the run."""
        os.close(self.lock)

    def _delete_content(self) -> None:
        # The files that identify a run are deleted last, so that an interrupted deletion can be repeated.
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name in ("config.json", "status.json")):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()


def read_config(run: Path) -> RunConfig:
    """Read the configuration of a run, open or not. Raises ConfigError."""
    try:
        text = (run / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{run} has no readable config.json ({error}): expected the folder of a run") from None
    return RunConfig.from_json(text)


def read_status(run: Path) -> dict[str, Any]:
    """Read the last status of a run, open or not. Raises ConfigError."""
    try:
        status = json.loads((run / "status.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{run} has no readable status.json ({error}): expected the folder of a run") from None
    if not isinstance(status, dict) or not {"state", "exit_code", "step", "versions"} <= status.keys():
        raise ConfigError(f"{run}/status.json was not written by a run")
    return status


def default_run_name(config: RunConfig) -> str:
    """Folder name of a run, of letters, digits, dots and dashes: `cifar10-resnet18-200ep-seed0`."""
    data = re.sub(r"[^A-Za-z0-9.]+", "-", os.path.basename(os.path.abspath(config.data.data))).strip("-.")[:40]
    epochs = f"{config.optim.epochs}ep" if config.optim.epochs is not None else None
    return "-".join(part for part in (data or "images", config.model.arch, epochs, f"seed{config.run.seed}") if part)


def _lock(path: Path) -> int:
    descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(descriptor, wait=False, inherited=False)
    except OSError:
        os.close(descriptor)
        raise ConfigError(f"another process is using {path}: wait for it, or choose another with --out") from None
    return descriptor


def _check_resumable(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ConfigError(f"there is no run to resume in {path}: omit --resume, or correct --out")
    if not any((path / "checkpoints").glob("step-*.safetensors")):
        raise CheckpointError(f"the run in {path} has no checkpoint to resume from: start again with --overwrite")


def _not_a_run(path: Path) -> str | None:
    """The reason why a folder must not be deleted, or None if it is certainly a run."""
    if path.is_symlink():
        return "it is a symbolic link"
    if path in (Path.home(), *(here := Path.cwd(), *here.parents)):
        return "it contains the current or home folder"
    with suppress(ConfigError):  # check its content, since many programs write a config.json
        config = read_config(path)
        if (path / "config.json").read_text(encoding="utf-8") == config.to_json():
            return None
    with suppress(ConfigError):
        read_status(path)
        return None
    return "it has no config.json or status.json of a run"
