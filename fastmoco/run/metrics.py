"""Metrics of a run: one JSON object per line in metrics.jsonl, and the same values in TensorBoard files under tb/.

A line has step, epoch and any of loss, lr, images_per_s, data_wait_percent, device_memory_bytes, knn_top1_percent, …,
named with their units; an evaluation also has the texts `verdict` and `remedy` (see verdict.py). A value that is not
finite is written as null, because JSON has no NaN.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from fastmoco.errors import CheckpointError
from fastmoco.run.appended import AppendedFile, EventFile
from pipelines.files import read_file, write_atomically

FILE_NAME = "metrics.jsonl"
TEXTS = ("verdict", "remedy")  # the other fields are numbers
PICTURE_WIDTH = 1200  # pixels
Record = dict[str, Any]


class MetricsWriter:
    """Appends to the metrics of a run. If the disk is full, lines are kept in memory and written later."""

    def __init__(self, run_dir: Path, *, tensorboard: bool = True) -> None:
        self.path = run_dir / FILE_NAME
        self._lines = AppendedFile(self.path)
        self._tb_dir = run_dir / "tb" if tensorboard else None
        self._events: EventFile | None = None
        self._first_step: int | None = None

    def write(self, step: int, epoch: int, **values: float | str | None) -> str | None:
        """Append one line, unbuffered. Returns a warning if it cannot be written now."""
        record = {"step": step, "epoch": epoch} | {name: _json_value(value) for name, value in values.items()}
        self._lines.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        if self._tb_dir is not None:
            self._events = self._events or EventFile(self._tb_dir, self._first_step)
            numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
            self._events.write(step, {name: value for name, value in numbers.items() if name != "step"})
        try:
            self.flush()
        except OSError as error:
            return f"{error.filename} cannot be written now ({error.strerror}): will retry"
        return None

    def picture(self, step: int, name: str, path: Path) -> None:
        """Add a picture for TensorBoard, scaled to PICTURE_WIDTH at most; nothing without TensorBoard. Raises OSError.

        It is written with the next metrics.
        """
        if self._tb_dir is None:
            return
        with Image.open(path) as image:
            drawn = image.convert("RGB")
        drawn.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
        encoded = io.BytesIO()
        drawn.save(encoded, "JPEG", quality=90)
        self._events = self._events or EventFile(self._tb_dir, self._first_step)
        self._events.picture(step, name, encoded.getvalue(), drawn.size)

    def flush(self) -> None:
        """Write the lines that are kept in memory. Raises OSError."""
        self._lines.flush()
        if self._events is not None:
            self._events.flush()

    def truncate_after(self, step: int) -> int:
        """Remove lines of later steps, and truncated or corrupt ones, before a run is resumed from `step`.

        Returns the number of corrupt lines, without a truncated last one. Raises OSError.
        """
        self.close()
        self._first_step = step + 1
        if not os.path.lexists(self.path):
            return 0
        lines = read_file(self.path).splitlines(keepends=True)
        records = [_parse(line) for line in lines]
        kept = [line for line, record in zip(lines, records, strict=True) if record and record["step"] <= step]
        if kept != lines or self.path.is_symlink():
            write_atomically(self.path, b"".join(kept))
        return sum(record is None and line.endswith(b"\n") for line, record in zip(lines, records, strict=True))

    def close(self) -> None:
        """Write pending lines and close all files. Raises OSError if that fails."""
        with ExitStack() as closing:
            closing.callback(self._lines.close)
            if self._events is not None:
                closing.callback(self._events.close)
                self._events = None


def read_metrics(path: Path, damaged: list[int] | None = None) -> list[Record]:
    """Read the records in metrics.jsonl, oldest first; null becomes NaN.

    damaged  takes the numbers of corrupt lines, which are then left out

    A truncated last line, of a run that is active or was killed, is ignored. Raises CheckpointError if the file cannot
    be read, or, without `damaged`, naming the line if one is corrupt.
    """
    try:
        lines = read_file(path).splitlines(keepends=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}): restore it, or train again"
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append({name: math.nan if value is None else value for name, value in record.items()})
        elif (number < len(lines) or line.endswith(b"\n")) and damaged is not None:
            damaged.append(number)
        elif number < len(lines) or line.endswith(b"\n"):
            raise CheckpointError(f"{path} line {number} is not valid: delete that line to read the others")
    return records


def finite_number(value: object) -> float | None:
    """A value as a finite number, else None; JSON's true and false are none."""
    return float(value) if isinstance(value, int | float) and _is_number(value) and math.isfinite(value) else None


def finite_values(records: Sequence[Mapping[str, Any]], field: str) -> list[float]:
    """The finite values of a metric, oldest first."""
    return [value for record in records if (value := finite_number(record.get(field))) is not None]


def points(records: Sequence[Record], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric where it was recorded; a value that is not finite is NaN."""
    found = [(record["step"], finite_number(record[field])) for record in records if record.get(field) is not None]
    return [step for step, _ in found], [math.nan if value is None else value for _, value in found]


def _parse(line: bytes) -> Record | None:
    """The record in a line, or None if it is truncated or corrupt."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if all(_is_valid(name, value) for name, value in record.items()) else None


def _is_valid(name: str, value: object) -> bool:
    return value is None or (type(value) is str if name in TEXTS else _is_number(value))


def _is_number(value: object) -> bool:
    """Whether a value is a float, or an integer that a float can hold; JSON's true and false are not."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _json_value(value: float | str | None) -> float | str | None:
    if value is None or isinstance(value, int | str):
        return value
    return float(value) if math.isfinite(value) else None
