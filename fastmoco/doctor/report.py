"""The findings as a table for people, and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmoco.doctor.findings import CHOICES, GROUPS, Result, Status
from fastmoco.doctor.units import one_line

_STYLES = {Status.OK: "green", Status.FAILED: "bold red", Status.MISSING: "yellow", Status.SKIPPED: "dim"}


def show(console: Console, results: Sequence[Result], seconds: float) -> None:
    """One table per group, then a summary."""
    for group in GROUPS:
        of_group = [result for result in results if result.check.group == group]
        if of_group:
            _show_group(console, group, of_group)
    for result in results:
        if result.check.name == CHOICES.name:
            console.print(_line(f"fastmoco train would use: {result.finding.text}", "bold"), soft_wrap=True)
    counts = {status: sum(r.finding.status == status for r in results) for status in Status}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    failed = [result.check.name for result in results if result.finding.status == Status.FAILED]
    console.print(_line(f"{summary}, in {seconds:.0f} s"), soft_wrap=True)
    if failed:
        console.print(_line(f"failed: {', '.join(failed)}", "bold red"), soft_wrap=True)


def _show_group(console: Console, group: str, results: Sequence[Result]) -> None:
    """A table on a terminal; elsewhere one line for each check, without control characters."""
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, min_width=13)
        table.add_column(no_wrap=True, min_width=7)
        table.add_column(overflow="fold")
        for check, finding, _ in results:
            table.add_row(
                _line(check.name, "cyan"), _line(finding.status, _STYLES[finding.status]), _line(finding.text)
            )
            if finding.advice:
                table.add_row("", "", _line("→ " + finding.advice, "yellow"))
        console.print(_line(group.capitalize(), "bold"), table, sep="\n")
        return
    console.print(_line(group.capitalize()))
    for check, finding, _ in results:
        console.print(_line(f"  {check.name:<13}  {finding.status:<7}  {finding.text}"), soft_wrap=True)
        if finding.advice:
            console.print(_line(f"  {'':<13}  {'':<7}  → {finding.advice}"), soft_wrap=True)


def _line(text: str, style: str = "") -> Text:
    """Never parsed as markup: messages contain names of files and of the system."""
    indent = len(text) - len(text.lstrip(" "))
    if text.isprintable():
        return Text(text, style)
    return Text(" " * indent + one_line(text, 10_000), style)


def as_json(
    results: Sequence[Result], *, version: str | None, device: str, exit_code: int, seconds: float
) -> dict[str, Any]:
    """The object that `fastmoco doctor --json` prints.

    fastmoco   version, or null if it is not installed as a package
    device     as torch names it: "cpu" or "cuda:0"
    ok         whether nothing failed
    exit_code  that of the process
    seconds    duration of all checks
    use        what `fastmoco train` would use, or null if that could not be determined
    checks     of each check: group, name, status (ok, failed, missing or skipped), text, advice, figures, seconds
    """
    use = next((r.finding for r in results if r.check.name == CHOICES.name and r.finding.status == Status.OK), None)
    return {
        "fastmoco": version,
        "device": device,
        "ok": exit_code == 0,
        "exit_code": exit_code,
        "seconds": round(seconds, 2),
        "use": None if use is None else _json_object(use.figures),
        "checks": [
            {
                "group": check.group,
                "name": check.name,
                "status": str(finding.status),
                "text": finding.text,
                "advice": finding.advice,
                "figures": _json_object(finding.figures),
                "seconds": round(check_seconds, 2),
            }
            for check, finding, check_seconds in results
        ],
    }


def _json_object(figures: Mapping[str, Any]) -> dict[str, Any]:
    """With null for NaN and infinity, which JSON lacks."""
    finite = {name: not isinstance(value, float) or math.isfinite(value) for name, value in figures.items()}
    return {name: value if finite[name] else None for name, value in figures.items()}
