"""What the folder of a run holds, as far as it can be read: of active, failed, earlier and damaged runs too."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastmoco.config import RunConfig
from fastmoco.console import duration
from fastmoco.errors import ConfigError
from fastmoco.run.directory import read_config, read_status
from fastmoco.run.metrics import FILE_NAME as METRICS_NAME
from fastmoco.run.metrics import Record, finite_number, read_metrics
from fastmoco.run.start_record import StartRecord, read_start
from pipelines.files import absolute, read_json_object

SILENT_S = 1800.0  # after which a run that is not said to have ended may have been killed
STATES = ("running", "done", "preempted", "failed")


@dataclass(frozen=True)
class RunFiles:
    """A run, from its files.

    name        of the folder; where several are compared, with what tells them apart
    status      status.json; empty if it is absent or damaged
    start       start.json; None of an earlier run
    metrics     readable records of metrics.jsonl, oldest first
    evaluation  eval/eval.json; empty if the run has not been evaluated
    notes       what is missing or damaged, one sentence each
    """

    folder: Path
    name: str
    config: RunConfig
    status: dict[str, Any] = field(default_factory=dict)
    start: StartRecord | None = None
    metrics: list[Record] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """One of STATES; `unknown` without a status."""
        state = self.status.get("state")
        return state if state in STATES else "unknown"

    @cached_property
    def steps_per_epoch(self) -> float | None:
        """As status.json says, or of an earlier run a record at the end of an epoch; None if neither is there."""
        if known := finite_number(self.status.get("steps_per_epoch")):
            return known
        ends = [r["step"] / r["epoch"] for r in self.metrics if "loss" not in r and r.get("epoch", 0) >= 1]
        return ends[0] if ends else None

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None if they are not known yet."""
        epochs = self.config.optim.epochs
        if self.steps_per_epoch is None or epochs is None:
            return None
        return round(self.steps_per_epoch * epochs)

    @property
    def step(self) -> int:
        """The last step that a file names."""
        recorded = max((record["step"] for record in self.metrics), default=0)
        return max(recorded, self.status.get("step", 0))

    def picture(self, name: str) -> Path | None:
        """A picture of the run by its path in the folder; None if it was not drawn."""
        path = self.folder / name
        return path if path.is_file() else None

    @property
    def confusion_matrices(self) -> list[Path]:
        return sorted((self.folder / "eval").glob("confusion-*.png"))

    def has_checkpoint(self) -> bool:
        return any((self.folder / "checkpoints").glob("step-*.safetensors"))


def read_run(folder: Path) -> RunFiles:
    """Read a run. Raises ConfigError if it is none, or if its config.json cannot be read."""
    folder = Path(absolute(folder))
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: expected that of a run, such as runs/NAME")
    if not (folder / "config.json").is_file():
        runs = sorted(path.parent for path in folder.glob("*/config.json"))
        hint = f"it has runs in it: fastmoco report {folder / '*'}" if runs else "expected the folder of a run"
        raise ConfigError(f"{folder} has no config.json: {hint}")
    config, notes = read_config(folder), []
    status: dict[str, Any] = {}
    try:
        status = read_status(folder)
    except ConfigError:
        notes.append("status.json is missing or damaged, so the state of the run is not known.")
    metrics, damaged = _metrics(folder / METRICS_NAME)
    if damaged:
        lines = "1 line" if damaged == 1 else f"{damaged:,} lines"
        notes.append(f"{lines} of metrics.jsonl could not be read and {'is' if damaged == 1 else 'are'} left out.")
    if status.get("state") == "running" and (silent_s := time.time() - _last_written(folder)) > SILENT_S:
        notes.append(f"Nothing was written for {duration(silent_s)}: if the run was killed, resume it.")
    evaluation, path = {}, folder / "eval" / "eval.json"
    if path.exists():
        evaluation = _evaluation(path)
        if not evaluation:
            notes.append("eval/eval.json is damaged, so its results are left out: run fastmoco eval again.")
    return RunFiles(folder, folder.name, config, status, read_start(folder), metrics, evaluation, notes)


def _metrics(path: Path) -> tuple[list[Record], int]:
    """The readable records, and the number of damaged lines; none of a run that has not begun."""
    damaged: list[int] = []
    return (read_metrics(path, damaged) if path.exists() else []), len(damaged)


def _last_written(folder: Path) -> float:
    """Time at which a file was last written that an active run keeps writing."""
    return max(
        (folder / name).stat().st_mtime
        for name in ("config.json", "status.json", METRICS_NAME)
        if (folder / name).exists()
    )


def _evaluation(path: Path) -> dict[str, Any]:
    """The results of `fastmoco eval`; empty if they are damaged."""
    content = read_json_object(path) or {}
    probes = content.get("probes")
    if not isinstance(probes, list) or not all(isinstance(p, dict) and isinstance(p.get("probe"), str) for p in probes):
        return {}
    return content if isinstance(content.get("label_free", {}), dict) else {}
