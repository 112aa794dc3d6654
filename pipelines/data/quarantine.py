"""Images that became bad after the data set was indexed: their replacement, and the file that lists them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.errors import DataError
from pipelines.files import open_to_append, read_file
from pipelines.platforms import lock

FILE_NAME = "quarantine.jsonl"
LEFT_OUT, REPLACED = "left out", "replaced by grey"


class Entry(NamedTuple):
    """A bad image, the reason, and whether it was left out or replaced."""

    image: str
    reason: str
    fate: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """A JSON Lines file with one line per bad image, appended to by any thread or process.

    path  the file; it need not exist
    most  maximum number of bad images; one more is an error
    """

    path: str
    most: int

    def note(self, entry: Entry) -> None:
        """Records an image once. Raises DataError if there are more than `most`, or if the file cannot be written."""
        try:
            with open_to_append(Path(self.path)) as file:
                lock(file.fileno(), wait=True)
                file.seek(0)
                known = _entries(file.read())
                if any(entry.image == other.image for other in known):
                    return
                if len(known) < self.most:
                    file.write(json.dumps(entry._asdict()).encode() + b"\n")
                    return
        except OSError as error:
            raise DataError(f"{entry.reason}; and it cannot be recorded in {self.path} ({error.strerror})") from error
        raise DataError(
            f"{entry.reason}; {self.path} already lists {self.most:,} bad images, the maximum: check the disk, fix the "
            f"files, and resume with --resume --allow-changed-data"
        )

    def entries(self) -> list[Entry]:
        """All bad images so far, in the order in which they were recorded. Raises OSError."""
        try:
            return _entries(read_file(Path(self.path)))
        except FileNotFoundError:
            return []


def grey(height: int, width: int, channels: int = 3) -> np.ndarray:
    """(H, W, C) uint8: the replacement of a bad image of that size.

    It is the same on every backend and in every epoch, whatever happened to the file. Another image of the data set
    would then be in it twice, and so be its own negative.
    """
    return np.full((height, width, channels), 128, dtype=np.uint8)


def _entries(lines: bytes) -> list[Entry]:
    """One entry per complete line; a crash of the machine may have left a torn one."""
    entries = []
    for line in lines.splitlines():
        try:
            values = json.loads(line)
            entries.append(Entry(*(str(values[name]) for name in Entry._fields)))
        except (ValueError, KeyError, TypeError):
            continue
    return entries
