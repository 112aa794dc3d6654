"""Tables, bar charts and notes from summaries of readings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.measure.harness import short
from benchmarks.reporting.page import Block, Picture, Table, Text
from benchmarks.reporting.plots import bars

_USUAL = "proportional set size"
Cell = Callable[[dict[str, Any]], str]
MEMORY_KEYS = ("nvml_bytes", "peak_allocated_bytes", "reserved_bytes", "peak_resident_bytes", "host_bytes")


def spread(summary: Mapping[str, Any]) -> str:
    """Median and quartiles."""
    return f"{short(summary['median'])} ({short(summary['lower_quartile'])}–{short(summary['upper_quartile'])})"


def median_of(key: str, scale: float = 1.0) -> Cell:
    """The median of a reading; empty if it was not measured."""
    return lambda case: short(case[key]["median"] * scale) if key in case else ""


def memory_mb(readings: Mapping[str, Any]) -> str:
    """The first kind of memory in MEMORY_KEYS that was measured, in MB."""
    value = next((readings[key] for key in MEMORY_KEYS if key in readings), None)
    if value is None:
        return "–"
    return short((value["median"] if isinstance(value, Mapping) else value) / 1e6)


def table(first: str, rows: Mapping[str, dict[str, Any]], columns: Mapping[str, Cell]) -> Table:
    """One row per case; columns that are empty in all rows are left out."""
    cells = {title: [cell(row) for row in rows.values()] for title, cell in columns.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    return Table((first, *cells), [tuple(line) for line in zip(rows, *cells.values(), strict=True)])


def bar_chart(name: str, cases: Mapping[str, Any], baseline: str, caption: str) -> Iterator[Picture]:
    """The rates of all cases; nothing without a case."""
    if not cases:
        return
    rates = {case: readings["images_per_s"] for case, readings in cases.items()}
    rows = [(case, r["median"], r["lower_quartile"], r["upper_quartile"]) for case, r in rates.items()]
    yield Picture(name, bars(rows, baseline), f"{caption}: images/s, median and quartiles")


def notes(result: Mapping[str, Any]) -> Iterator[Block]:
    """How far it came if it was stopped, the data, what memory is taken from, and what was not measured."""
    if not result.get("complete", True):
        yield Text(f"**Stopped after {result['rounds']} of {result['planned_rounds']} rounds.**")
    if data := result.get("data"):
        stored = f"{data['description']}, {data['stored_bytes'] / 1e6:,.0f} MB as stored"
        cached = data["stored_bytes"] / 2**30 < result["environment"]["memory_gib"] / 2
        yield Text(stored + (", read from the page cache." if cached else "."))
    if (source := result.get("environment", {}).get("memory_from", {}).get("host", _USUAL)) != _USUAL:
        yield Text(f"Host memory is the {source}: pages that processes share may count more than once.")
    for name, reason in result.get("left_out", {}).items():
        yield Text(f"Not measured: {name} ({reason}).")
