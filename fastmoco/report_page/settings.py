"""Settings of runs as text: all of one, or those in which several differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmoco.config.checks import flag
from fastmoco.report_page.run_files import RunFiles

_OF_THE_COMMAND = ("out", "overwrite", "resume", "resume_from", "allow_changed", "allow_changed_data")


def all_settings(run: RunFiles) -> list[tuple[str, str]]:
    """Flag and value of every setting."""
    return [(flag(name), text(value)) for name, value in run.config.flat().items()]


def differing_settings(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Flag, and its value in each run, of the settings in which the runs differ."""
    flats = [run.config.flat() for run in runs]
    names = [name for name in flats[0] if name not in _OF_THE_COMMAND]
    return [
        (flag(name), [text(flat[name]) for flat in flats])
        for name in names
        if any(flat[name] != flats[0][name] for flat in flats)
    ]


def text(value: Any) -> str:
    """A value as it is given to a flag; a dash for what was not set, yes and no for switches."""
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(text, value)) if isinstance(value, tuple) else str(value)
