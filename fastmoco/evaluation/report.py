"""What an evaluation says: tables for people, eval.json for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmoco.console import Fact, say, show_facts
from fastmoco.evaluation.collapse import LabelFree
from fastmoco.evaluation.confusion import Accuracy
from fastmoco.evaluation.few_label import FewLabels
from fastmoco.evaluation.suite import Result
from fastmoco.files import write_atomically
from pipelines.data.decode import printable

_ALL_CLASSES = 20  # up to so many, every class has a row; of more, the worst and the best
_EXTREMES = 5


def show_table(console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> None:
    """A table, or aligned lines off a terminal. The columns from `numbers` on are aligned to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if console.is_terminal:
        say(console, title, "bold")  # as the table's own title it would be wrapped to its width
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for place, head in enumerate(heads):
            table.add_column(head, justify="right" if place >= numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    say(console, title)
    for row in (heads, *rows):
        cells = [
            cell.rjust(width) if place >= numbers else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say(console, "  " + "  ".join(cells).rstrip())


def show_results(console: Console, results: Sequence[Result]) -> None:
    """A row for every probe."""
    if results:
        rows = [[_name(r), r.words, *_numbers(r.found), f"{r.seconds:.1f} s"] for r in results]
        show_table(console, "accuracy", ("probe", "how", "top-1 %", "top-5 %", "time"), rows, numbers=2)


def show_classes(console: Console, results: Sequence[Result], names: Sequence[str]) -> None:
    """Top-1 of every class; of many, those of the extremes as the first probe has them."""
    judged = [(result.probe, result.found) for result in results if isinstance(result.found, Accuracy)]
    if not judged:
        return
    first = judged[0][1].per_class_percent
    asked = [i for i, value in enumerate(first) if value is not None]
    asked.sort(key=lambda i: first[i] or 0.0)
    if len(asked) > _ALL_CLASSES:
        asked = asked[:_EXTREMES] + asked[-_EXTREMES:]
        title = f"top-1 % of the {_EXTREMES} worst and the {_EXTREMES} best of {len(names):,} classes"
    else:
        title = "top-1 % of every class, the worst first"
    columns = [found.per_class_percent for _, found in judged]
    rows = [[names[i], *(_percent(column[i]) for column in columns)] for i in asked]
    show_table(console, title, ("class", *(probe for probe, _ in judged)), rows, numbers=1)


def show_label_free(console: Console, found: LabelFree) -> None:
    facts = [
        Fact("alignment", f"{found.alignment:.3f}", "squared distance of two views of an image; 0 is best"),
        Fact("uniformity", f"{found.uniformity:.3f}", "0: all features alike; -4: spread over the whole sphere"),
        Fact("effective rank", f"{found.effective_rank:.1f} of {found.most_directions:,}", "directions that are used"),
        Fact("separation", f"{found.separation:.3f}", "alignment, over the same of views of two images"),
    ]
    show_facts(console, "without labels", facts)
    say(console, f"verdict: {found.verdict}", "bold")


def write_json(
    path: Path,
    *,
    backbone: dict[str, Any],
    data: dict[str, Any],
    results: Sequence[Result],
    label_free: LabelFree,
    files: Sequence[str],
    versions: dict[str, Any],
    seconds: float,
) -> None:
    """Everything that was measured, numbers that are not finite as null. Raises OSError."""
    content = {
        "backbone": backbone,
        "data": data,
        "probes": [_as_json(result) for result in results],
        "label_free": label_free.as_json(),
        "files": list(files),
        "seconds": seconds,
        "versions": versions,
    }
    write_atomically(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _as_json(result: Result) -> dict[str, Any]:
    about = {"probe": result.probe, "settings": result.settings, "seconds": result.seconds}
    if isinstance(result.found, FewLabels):
        return about | vars(result.found)
    found = result.found
    accuracy = {"top1_percent": found.top1_percent, "top5_percent": found.top5_percent}
    return about | accuracy | {"per_class_percent": found.per_class_percent}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _name(result: Result) -> str:
    return f"{result.probe} {result.found.amount}" if isinstance(result.found, FewLabels) else result.probe


def _numbers(found: Accuracy | FewLabels) -> tuple[str, str]:
    """Top-1 and top-5 as they are shown."""
    if isinstance(found, Accuracy):
        return _percent(found.top1_percent), _percent(found.top5_percent)
    spread = "" if found.spread_percent is None else f" ± {found.spread_percent:.1f}"
    return f"{found.top1_percent:.1f}{spread}", ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
