"""Metrics of a run: one JSON object per line in metrics.jsonl, and the same values in TensorBoard files under tb/.

A line has step, epoch and any of loss, lr, images_per_s, data_wait_percent, device_memory_bytes, knn_top1_percent, …,
named with their units. A value that is not finite is written as null, because JSON has no NaN.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "metrics.jsonl"
Record = dict[str, Any]


class MetricsWriter:
    """Appends to the metrics of a run. If the disk is full, lines are kept in memory and written later."""

    def __init__(self, run_dir: Path, *, tensorboard: bool = True) -> None:
        self.path = run_dir / FILE_NAME
        self._tb_dir = run_dir / "tb" if tensorboard else None
        self._tb: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._file: BinaryIO | None = None
        self._pending = b""

    def write(self, step: int, epoch: int, **values: float | None) -> str | None:
        """Append one line, unbuffered. Returns a warning if it cannot be written now."""
        record = {"step": step, "epoch": epoch} | {name: _json_number(value) for name, value in values.items()}
        self._pending += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            self._flush()
            self._write_tensorboard(step, record)
        except OSError as error:
            return f"{self.path} cannot be written now ({error.strerror or error}): will retry"
        return None

    def truncate_after(self, step: int) -> None:
        """Remove lines of later steps, and truncated or corrupt ones, before a run is resumed from `step`."""
        self.close()
        self._purge_step = step + 1  # TensorBoard then hides events from this step on
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if (record := _parse(line)) is not None and record["step"] <= step]
            if kept != lines:
                write_atomically(self.path, b"".join(kept).decode())

    def close(self) -> None:
        """Write pending lines and close all files. Raises OSError if that fails."""
        try:
            if self._pending:
                self._flush()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None
            if self._tb is not None:
                self._tb.close()
                self._tb = None

    def _flush(self) -> None:
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - until `close`
        while self._pending:  # a disk that fills up accepts a part of the bytes
            self._pending = self._pending[self._file.write(self._pending) :]

    def _write_tensorboard(self, step: int, record: Record) -> None:
        if self._tb_dir is None:
            return
        if self._tb is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._tb = SummaryWriter(str(self._tb_dir), purge_step=self._purge_step)
        for name, value in record.items():
            if value is not None and name != "step":
                self._tb.add_scalar(name, value, step)


def read_metrics(path: Path) -> list[Record]:
    """Read the records in metrics.jsonl, oldest first; null becomes NaN.

    A truncated last line, of a run that is active or was killed, is ignored. Raises OSError if the file cannot be read,
    and ValueError, naming the line, if one is corrupt.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append({name: math.nan if value is None else value for name, value in record.items()})
        elif number < len(lines) or line.endswith(b"\n"):
            raise ValueError(f"{path} line {number} is not valid: delete that line to read the others")
    return records


def _parse(line: bytes) -> Record | None:
    """The record in a line, or None if it is truncated or corrupt."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _json_number(value: float | None) -> float | None:
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None
