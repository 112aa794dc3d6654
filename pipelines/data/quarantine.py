"""Images that turned bad after the data set was indexed: what takes their place, and where that is written down."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipelines.errors import DataError

FILE_NAME = "quarantine.jsonl"
LEFT_OUT, REPLACED = "left out", "replaced by grey"


class Entry(NamedTuple):
    """A bad image, why, and what became of it."""

    image: str
    reason: str
    fate: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """A file with a line for every bad image, written by whichever thread or process meets one.

    path  of the file; it need not exist
    most  images that may be bad; one more is an error
    """

    path: str
    most: int

    def note(self, entry: Entry) -> None:
        """Writes an image down, once. Raises DataError where they are too many, or cannot be written down."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            with open(descriptor, "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                known = _entries(file.readall())
                if any(entry.image == other.image for other in known):
                    return
                if len(known) < self.most:
                    file.write(json.dumps(entry._asdict()).encode() + b"\n")
                    return
        except OSError as error:
            raise DataError(f"{entry.reason}; and it cannot be noted in {self.path} ({error.strerror})") from error
        raise DataError(
            f"{entry.reason}; with the {self.most:,} bad images in {self.path} these are too many: see whether the "
            f"disk is well, fix the files, and resume with --resume"
        )

    def entries(self) -> list[Entry]:
        """All bad images so far, in the order in which they were met. Raises OSError."""
        try:
            with open(self.path, "rb") as file:
                return _entries(file.read())
        except FileNotFoundError:
            return []


def grey(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8: what takes the place of a bad image of that size.

    The same on every backend, and in every epoch, whatever has become of the file. Another image would do as well, but
    as a positive of itself under two numbers it would also be its own negative.
    """
    return np.full((height, width, 3), 128, dtype=np.uint8)


def _entries(lines: bytes) -> list[Entry]:
    """One for every whole line; a machine that went down may have left a torn one."""
    entries = []
    for line in lines.splitlines():
        try:
            values = json.loads(line)
            entries.append(Entry(*(str(values[name]) for name in Entry._fields)))
        except (ValueError, KeyError, TypeError):
            continue
    return entries
