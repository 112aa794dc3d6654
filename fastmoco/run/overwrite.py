"""What --overwrite deletes: the files that a run and its evaluation write, by name, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

LOCK_NAME = ".lock"
_FILES = (
    "quarantine.jsonl",
    "data.npz",
    "batch_size.json",
    "config.json",
    "start.json",
    "status.json",
    "metrics.jsonl",
    "loggers.json",
    "views.png",
    "curves.png",
    "report.html",
    "backbone.safetensors",
)
_IN_FOLDERS = {
    "checkpoints": r"step-\d{9,}\.safetensors(\.sha256)?",
    "tb": r"events\.out\.tfevents\..+|projector_config\.pbtxt|features\.(bytes|tsv|png)",
    "eval": r"eval\.json|retrieval\.png|feature_map\.png|confusion-[a-z-]+\.(csv|png)",
}
_TEMPORARY = r"(\.[0-9a-f]{8})?\.tmp"  # see `pipelines.files.replacing`


def foreign_entry(path: Path) -> Path | None:
    """Something in the folder of a run that no run writes, or None if there is nothing else. Raises OSError."""
    return next((entry for entry, is_known in _entries(path) if not is_known), None)


def delete_run(path: Path) -> None:
    """Delete all that a run wrote to its folder, but not its lock. Links are never followed. Raises OSError."""
    # The files that identify a run are deleted last, so that an interrupted deletion can be repeated.
    entries = [entry for entry, is_known in _entries(path) if is_known]
    for entry in sorted(entries, key=lambda entry: entry.name in ("config.json", "status.json")):
        entry.unlink()
    for name in _IN_FOLDERS:
        if (path / name).is_dir():
            (path / name).rmdir()


def delete_temporary(path: Path) -> None:
    """Delete what a killed process left of the files directly in the folder of a run. Raises OSError."""
    for entry, is_known in _entries(path):
        if is_known and entry.parent == path and entry.name.endswith(".tmp"):  # `fastmoco eval` may be writing below
            entry.unlink()


def _entries(path: Path) -> Iterator[tuple[Path, bool]]:
    """The files, links and other folders in the folder of a run, and whether a run writes what has this name."""
    for entry in sorted(path.iterdir()):
        is_folder = entry.is_dir() and not entry.is_symlink()
        if entry.name in _IN_FOLDERS and is_folder:
            pattern = re.compile(f"({_IN_FOLDERS[entry.name]})({_TEMPORARY})?")
            for file in sorted(entry.iterdir()):
                yield file, pattern.fullmatch(file.name) is not None and (file.is_symlink() or not file.is_dir())
        elif entry.name != LOCK_NAME:
            name = re.sub(f"{_TEMPORARY}$", "", entry.name)
            yield entry, not is_folder and (name in _FILES or name in _IN_FOLDERS)
