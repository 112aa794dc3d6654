"""The folder of a run: its lock, the paths in it, and the writing of its files.

config.json           the resolved configuration
status.json           state, exit code, message, last verdict and remedy, step, epoch, commit, versions; replaced
                      atomically
metrics.jsonl  tb/    see metrics.py
checkpoints/          see checkpoint.py
data.npz              see data_record.py; for images in files
batch_size.json       see batch_memory.py; with --batch-size auto
views.png curves.png backbone.safetensors
.lock                 locked by the process that writes; its content is space for the last status on a full disk
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from fastmoco.config import RunConfig
from fastmoco.console import resume_command
from fastmoco.errors import CheckpointError, ConfigError, ExitCode
from fastmoco.run.environment import git_commit, versions
from fastmoco.run.metrics import FILE_NAME as METRICS_NAME
from fastmoco.run.overwrite import LOCK_NAME, delete_run, foreign_entry
from fastmoco.run.verdict import Verdict, last_verdict
from pipelines.files import absolute, is_full, open_to_append, read_file, write_atomically
from pipelines.platforms import lock, open_folder

_RESERVED_BYTES = 16_384  # of the disk, in the lock file: enough for status.json


@dataclass(frozen=True)
class RunDirectory:
    """The open folder of a run, locked until this process exits or calls `close`.

    Every write raises CheckpointError if the folder was deleted or renamed after it was opened.

    folder  its descriptor; None on Windows, where an open folder can be neither deleted nor renamed
    plan    steps, steps_per_epoch and chance_loss of the run, once they are known, for status.json
    """

    path: Path
    lock: BinaryIO
    folder: int | None
    plan: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
        """Create the folder of a new run, or open an existing one to resume or to overwrite its run.

        Raises ConfigError if it is not a folder, not writable, in use by another process, not empty without `resume` or
        `overwrite`, has no run to resume, is to be overwritten and is not recognisably a run, or has links for folders;
        CheckpointError if the run to resume has no checkpoint, or if the disk is full.
        """
        path = Path(absolute(path))
        try:
            if path.exists() and not path.is_dir():
                raise ConfigError(f"{path} is a file, expected a folder for the run: choose another with --out")
            if resume:
                _check_resumable(path)
            has_content = path.is_dir() and any(entry.name != LOCK_NAME for entry in path.iterdir())
            if has_content and not (resume or overwrite):
                raise ConfigError(f"{path} is not empty: use --resume to continue, --overwrite to replace it, or --out")
            if has_content and overwrite:
                _check_overwritable(path)
            elif has_content:
                _check_no_links(path)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _lock(path), open_folder(str(path)))
            try:
                if overwrite:
                    delete_run(path)
            except OSError:
                run.close()
                raise
        except OSError as error:
            text = f"{error.filename or path} cannot be used for the run ({error.strerror or error})"
            if is_full(error):
                raise CheckpointError(f"{text}: free space, or choose another with --out") from error
            raise ConfigError(f"{text}: choose another with --out") from error
        run._reserve()
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

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Turn an OSError of writing a file of the run into a CheckpointError of one line."""
        self.check_present()
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path} ({error.strerror or error}): free space or mend the disk; if there is a "
                f"checkpoint, resume with: {resume_command(self.path)}"
            ) from error

    def check_present(self) -> None:
        """Raise CheckpointError if the folder is no longer at its path: nothing is created there again."""
        if self._is_at(self.path):
            return
        moved = self.moved_to()
        remedy = (
            "start again" if moved is None else f"rename {moved} back, and resume with: {resume_command(self.path)}"
        )
        raise CheckpointError(f"{self.path}, the folder of the run, was deleted or renamed while it trained: {remedy}")

    def moved_to(self) -> Path | None:
        """The path that the folder was renamed to; None if it was deleted, or where the system does not tell."""
        try:
            moved = Path(os.readlink(f"/proc/self/fd/{self.folder}"))
        except OSError:
            return None
        return moved if moved != self.path and self._is_at(moved) else None

    def _is_at(self, path: Path) -> bool:
        if self.folder is None:
            return True
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def write_config(self, config: RunConfig) -> None:
        """Raises CheckpointError."""
        self.write_text("config.json", config.to_json())

    def write_text(self, name: str, text: str) -> None:
        """Replace a file of the run. Raises CheckpointError."""
        path = self.path / name
        with self.writing(path):
            write_atomically(path, text)

    def write_status(
        self,
        *,
        step: int,
        epoch: int,
        exit_code: int | None = None,
        message: str = "",
        verdict: Verdict | None = None,
    ) -> None:
        """Replace status.json; no exit code means that the run is still active, no verdict that none was evaluated.

        The last status of a run may use the space reserved for it. Raises OSError.
        """
        self.check_present()
        states = {None: "running", ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted"}
        status = {
            "state": states.get(exit_code, "failed"),
            "exit_code": exit_code,
            "message": message,
            **({} if verdict is None else verdict._asdict()),
            "step": step,
            "epoch": epoch,
            **self.plan,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_commit": git_commit(),
            "versions": versions(),
        }
        path, text = self.path / "status.json", json.dumps(status, indent=2) + "\n"
        try:
            write_atomically(path, text)
        except OSError as error:
            if exit_code is None or not is_full(error):
                raise
            self.lock.truncate(0)
            write_atomically(path, text)

    def write_failure(self, exit_code: int, message: str) -> None:
        """Record why a run failed, wherever its folder is now; nothing before it has begun. Raises OSError."""
        run = replace(self, path=self.moved_to() or self.path)
        if not (run.path / "config.json").exists():
            return
        step, epoch, verdict = 0, 0, None
        with suppress(ConfigError):  # a full disk may have kept the first status from being written
            previous = read_status(run.path)
            step, epoch, verdict = previous["step"], previous.get("epoch", 0), last_verdict([previous])
        run.write_status(step=step, epoch=epoch, exit_code=exit_code, message=message, verdict=verdict)

    def close(self) -> None:
        """Let another process open the run."""
        self.lock.close()
        if self.folder is not None:
            os.close(self.folder)

    def _reserve(self) -> None:
        """Fill the lock file, with bytes that no file system compresses."""
        missing = _RESERVED_BYTES - os.fstat(self.lock.fileno()).st_size
        if missing > 0:
            with suppress(OSError):  # the disk is full already
                self.lock.write(os.urandom(missing))


def read_config(run: Path) -> RunConfig:
    """Read the configuration of a run, open or not. Raises ConfigError."""
    try:
        text = read_file(run / "config.json").decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{run} has no readable config.json ({error}): expected the folder of a run") from None
    try:
        return RunConfig.from_json(text)
    except ConfigError as error:
        raise ConfigError(f"{run / 'config.json'}: {error}") from None


def read_status(run: Path) -> dict[str, Any]:
    """Read the last status of a run, open or not. Raises ConfigError."""
    try:
        status = json.loads(read_file(run / "status.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{run} has no readable status.json ({error}): expected the folder of a run") from None
    if (
        not isinstance(status, dict)
        or not {"state", "exit_code", "step", "versions"} <= status.keys()
        or not isinstance(status["exit_code"], int | None)
        or not isinstance(status["step"], int)
    ):
        raise ConfigError(f"{run}/status.json was not written by a run")
    return status


def _lock(path: Path) -> BinaryIO:
    file = open_to_append(path / LOCK_NAME)
    try:
        lock(file.fileno(), wait=False, inherited=False)
    except OSError:
        file.close()
        raise ConfigError(f"another process is using {path}: wait for it, or choose another with --out") from None
    return file


def _check_resumable(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ConfigError(f"there is no run to resume in {path}: omit --resume, or correct --out")
    if not any((path / "checkpoints").glob("step-*.safetensors")):
        raise CheckpointError(f"the run in {path} has no checkpoint to resume from: start again with --overwrite")


def _check_no_links(path: Path) -> None:
    for folder in (path / "checkpoints", path / "tb"):
        if folder.is_symlink():
            raise ConfigError(f"{folder} is a symbolic link, and a run writes to its own folder only: replace the link")


def _check_overwritable(path: Path) -> None:
    """Raise ConfigError unless a folder is certainly a run, and has nothing in it but what a run writes."""
    reason = _not_a_run(path)
    if reason is None and (foreign := foreign_entry(path)) is not None:
        reason = f"no run wrote {foreign} (move it elsewhere to replace the run)"
    if reason is not None:
        raise ConfigError(f"--overwrite will not delete {path}, because {reason}: choose another with --out")


def _not_a_run(path: Path) -> str | None:
    """The reason why a folder must not be deleted, or None if it is certainly that of a run."""
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
