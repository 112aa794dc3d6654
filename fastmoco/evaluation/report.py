"""Report of an evaluation: tables on the terminal, and eval.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmoco.backbones.read import LoadedBackbone
from fastmoco.console import Fact, say, show_facts
from fastmoco.evaluation.collapse import LabelFree
from fastmoco.evaluation.confusion import Accuracy
from fastmoco.evaluation.few_label import FewLabelAccuracy
from fastmoco.evaluation.suite import Result
from fastmoco.output import finite
from fastmoco.registry import ARCHITECTURES
from fastmoco.run.verdict import verdict_line
from pipelines.data.decode import printable
from pipelines.files import write_atomically

_MAX_CLASSES = 20  # with more, only the worst and the best classes are listed
_EXTREMES = 5


def show_table(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], first_number: int
) -> None:
    """Print a table, or aligned lines off a terminal. Columns from `first_number` on are right-aligned."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if console.is_terminal:
        say(console, title, "bold")  # a title of the Table would be wrapped to its width
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column, name in enumerate(header):
            table.add_column(name, justify="right" if column >= first_number else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    say(console, title)
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if column >= first_number else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say(console, "  " + "  ".join(cells).rstrip())


def show_results(console: Console, results: Sequence[Result], queries: int, bank: int) -> None:
    """Print the accuracy of every probe on the queries, fitted on the bank."""
    if results:
        title = f"accuracy of {queries:,} queries, against a bank of {bank:,} images"
        rows = [[_name(r), r.description, *_numbers(r.accuracy), f"{r.seconds:.1f} s"] for r in results]
        show_table(console, title, ("probe", "settings", "top-1 %", "top-5 %", "time"), rows, first_number=2)


def show_classes(console: Console, results: Sequence[Result], names: Sequence[str]) -> None:
    """Print top-1 per class, sorted by the first probe; of many classes, only the worst and the best."""
    columns = {r.probe: r.accuracy.per_class_percent for r in results if isinstance(r.accuracy, Accuracy)}
    if not columns:
        return
    first = next(iter(columns.values()))
    listed = [i for i, value in enumerate(first) if value is not None]
    listed.sort(key=lambda i: first[i] or 0.0)
    if len(listed) > _MAX_CLASSES:
        listed = listed[:_EXTREMES] + listed[-_EXTREMES:]
        title = f"top-1 % of the {_EXTREMES} worst and the {_EXTREMES} best of {len(names):,} classes"
    else:
        title = "top-1 % per class, the worst first"
    rows = [[names[i], *(_percent(column[i]) for column in columns.values())] for i in listed]
    show_table(console, title, ("class", *columns), rows, first_number=1)


def show_label_free(console: Console, measured: LabelFree) -> None:
    """Print the measures without labels and the collapse diagnosis."""
    rank = f"{measured.effective_rank:.1f} of {measured.most_directions:,}"
    facts = [
        Fact(
            "alignment",
            f"{measured.alignment:.3f}",
            "squared distance between two views of an image; lower is better, 0 is best",
        ),
        Fact(
            "uniformity",
            f"{measured.uniformity:.3f}",
            "lower is better; 0: all features equal; -4: spread over the whole sphere",
        ),
        Fact("effective rank", rank, "directions in which the features vary; more is better"),
        Fact(
            "separation",
            f"{measured.separation:.3f}",
            "alignment over the same distance between views of two different images; lower is better",
        ),
    ]
    show_facts(console, "without labels", facts)
    say(console, verdict_line(measured.learning), "bold")


def backbone_facts(backbone: LoadedBackbone) -> list[Fact]:
    """Rows for what is evaluated, and where it is from."""
    width = f" × {backbone.width:g}" if backbone.width != 1 else ""
    stem = f", {backbone.stem} stem" if backbone.arch in ARCHITECTURES else ""
    return [
        Fact("backbone", f"{backbone.arch}{width}{stem}, {backbone.feature_dim:,} features"),
        Fact("from", backbone.origin),
    ]


class Record:
    """eval.json, written again after every probe, so that an evaluation that is stopped keeps those that have ended.

    `ended` in it tells whether the evaluation has.
    """

    def __init__(
        self,
        path: Path,
        *,
        backbone: dict[str, Any],
        data: dict[str, Any],
        label_free: LabelFree,
        versions: dict[str, Any],
    ) -> None:
        self.results: list[Result] = []
        self._path = path
        self._head: dict[str, Any] = {"backbone": backbone, "data": data, **label_free.learning._asdict()}
        self._tail: dict[str, Any] = {"label_free": label_free.as_json(), "versions": versions}

    def kept(self, results: Iterator[Result], console: Console) -> Iterator[Result]:
        """The same results, each printed and kept as soon as it is there. If interrupted, says what is kept."""
        try:
            for result in results:
                self.results.append(result)
                top1, _ = _numbers(result.accuracy)
                say(console, f"{_name(result)}: top-1 {top1} % in {result.seconds:.1f} s  ({result.description})")
                yield result
        except KeyboardInterrupt:
            names = ", ".join(_name(result) for result in self.results)
            say(console, f"stopped: {names or 'no probe'} ended before, kept in {self._path}", "yellow")
            raise

    def write(self, files: Sequence[str], seconds: float, *, ended: bool) -> dict[str, Any]:
        """Write all metrics so far as JSON, and return them; NaN and infinities become null. Raises OSError."""
        probes = [_as_json(result) for result in self.results]
        record = {"ended": ended, "probes": probes, "files": list(files), "seconds": seconds}
        content = finite(self._head | record | self._tail)
        write_atomically(self._path, json.dumps(content, indent=2, allow_nan=False) + "\n", shared=True)
        return content


def _as_json(result: Result) -> dict[str, Any]:
    record = {"probe": result.probe, "settings": result.settings, "seconds": result.seconds}
    accuracy = result.accuracy
    if isinstance(accuracy, FewLabelAccuracy):
        return record | vars(accuracy)
    record |= {"top1_percent": accuracy.top1_percent, "top5_percent": accuracy.top5_percent}
    return record | {"per_class_percent": accuracy.per_class_percent}


def _name(result: Result) -> str:
    accuracy = result.accuracy
    return f"{result.probe} {accuracy.amount}" if isinstance(accuracy, FewLabelAccuracy) else result.probe


def _numbers(accuracy: Accuracy | FewLabelAccuracy) -> tuple[str, str]:
    """Top-1 and top-5 as text."""
    if isinstance(accuracy, Accuracy):
        return _percent(accuracy.top1_percent), _percent(accuracy.top5_percent)
    spread = "" if accuracy.spread_percent is None else f" ± {accuracy.spread_percent:.1f}"
    return f"{accuracy.top1_percent:.1f}{spread}", ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
