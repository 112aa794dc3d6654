"""A run as it is seen from outside while it trains: its files are read, never locked, and may be half written.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastmoco.run.metrics import FILE_NAME, finite_number
from pipelines.files import json_object, open_to_read, read_json_object

_MAX_BYTES = 64 * 2**20  # read at a time
_SERIES = ("loss", "knn_top1_percent", "effective_rank")


@dataclass
class FollowedRun:
    """The latest numbers of a run, and what they were before.

    folder  of the run, which may not exist yet
    status  status.json as last read; empty before that
    settings  config.json, read with every new status; empty before that
    latest  the newest value of every metric, and texts such as `verdict`
    series  values of the loss, kNN accuracy and effective rank so far, oldest first
    """

    folder: Path
    status: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _SERIES})
    _read: int = 0
    _start: bytes = b""

    def update(self) -> bool:
        """Read what is new. Whether there was anything."""
        status = read_json_object(self.folder / "status.json")
        changed = status is not None and status != self.status
        if changed:  # a run writes its settings before its status
            self.settings = read_json_object(self.folder / "config.json") or self.settings
        self.status = status or self.status
        return self._read_metrics() or changed

    @property
    def exists(self) -> bool:
        """Whether the run has begun."""
        return bool(self.status)

    @property
    def state(self) -> str:
        """running, done, preempted or failed; `not begun` before there is a status."""
        return str(self.status.get("state", "not begun"))

    @property
    def has_ended(self) -> bool:
        return self.exists and self.state != "running"

    @property
    def step(self) -> int:
        """Completed steps, by whichever file knows more."""
        if self.has_ended:
            return int(self.status.get("step", 0))
        return max(int(self.status.get("step", 0)), int(self.latest.get("step", 0)))

    @property
    def steps(self) -> int | None:
        """Of the whole run, if it says."""
        steps = self.status.get("steps")
        return int(steps) if isinstance(steps, int | float) and steps > 0 else None

    @property
    def epochs(self) -> float | None:
        """Completed epochs, with their fraction, if the run says how many steps they have."""
        per_epoch = self.status.get("steps_per_epoch")
        return self.step / per_epoch if isinstance(per_epoch, int | float) and per_epoch > 0 else None

    @property
    def chance_loss(self) -> float | None:
        return self.number("chance_loss", self.status)

    def number(self, name: str, values: dict[str, Any] | None = None) -> float | None:
        """A metric as a finite number, else None."""
        return finite_number((self.latest if values is None else values).get(name))

    def text(self, name: str) -> str:
        """A text such as `verdict`, of the metrics or the status; empty without."""
        value = self.latest.get(name, self.status.get(name))
        return value if isinstance(value, str) else ""

    def left_s(self, batch_size: int | None) -> float | None:
        """Seconds left at the latest rate, without evaluations."""
        rate, steps = self.number("images_per_s"), self.steps
        if self.has_ended or not rate or steps is None or batch_size is None:
            return None
        return max(0, steps - self.step) * batch_size / rate

    def silent_s(self) -> float | None:
        """Seconds since the run last wrote anything."""
        times = []
        for name in (FILE_NAME, "status.json"):
            try:
                times.append((self.folder / name).stat().st_mtime)
            except OSError:
                continue
        return None if not times else max(0.0, datetime.now(UTC).timestamp() - max(times))

    def config(self, group: str, name: str) -> Any:
        """A setting in config.json; None where that cannot be read."""
        values = self.settings.get(group)
        return values.get(name) if isinstance(values, dict) else None

    def _read_metrics(self) -> bool:
        """Read the lines since the last time; all again if the file is another one, as after a resume."""
        path = self.folder / FILE_NAME
        try:
            with open_to_read(path) as file:
                start = file.read(len(self._start) or 256)
                size = file.seek(0, 2)
                if size < self._read or start[: len(self._start)] != self._start:
                    self._restart()
                file.seek(self._read)
                data = file.read(_MAX_BYTES)
        except OSError:
            return False
        end = data.rfind(b"\n") + 1  # a line that is being written is read when it is whole
        for line in data[:end].splitlines():
            self._add(json_object(line))
        self._start = self._start or start[: self._read + end]
        self._read += end
        return end > 0

    def _restart(self) -> None:
        self._read, self._start, self.latest = 0, b"", {}
        self.series = {name: [] for name in _SERIES}

    def _add(self, record: dict[str, Any] | None) -> None:
        if record is None or type(record.get("step")) is not int:
            return
        self.latest |= record
        for name, values in self.series.items():
            if (value := self.number(name, record)) is not None:
                values.append(value)


def runs_in(folder: Path) -> list[Path]:
    """The folders in a folder that have a run, by name, also those of sweeps; empty if it is not there."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return []
    runs: list[Path] = []
    for entry in entries:
        runs += [entry] if is_run(entry) else [one for one in sorted(entry.glob("*/")) if is_run(one)]
    return runs


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run that has begun."""
    return (folder / "status.json").is_file() and (folder / "config.json").is_file()
