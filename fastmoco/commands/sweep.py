"""`fastmoco sweep`: one run for every value, a table, a plot and a JSON file."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from fastmoco.config import RunConfig
from fastmoco.config.checks import flag
from fastmoco.errors import ConfigError
from fastmoco.recipes import PUBLISHED, check_data, entry
from fastmoco.sweep.runs import Axis, Cell, paper_percent, plan, run_sweep, write_json

HELP = """usage: fastmoco sweep [RECIPE] --vary FLAG=VALUE,VALUE [--vary ...] [--out FOLDER] [--overwrite] [FLAGS]

Trains RECIPE once for every value of a flag of `fastmoco train`; several --vary make a grid. FLAGS are those of
`fastmoco train`, and hold for all runs. The same command again goes on: finished runs are skipped, an interrupted one
is resumed. Without --vary, an ablation recipe (see fastmoco recipes) varies what it is about.

  --vary moco-m=0,0.9,0.99   values; true or false for a switch, + between the numbers of one value (head=100+50,512)
  --out FOLDER               of the runs, sweep.json and sweep.png (default: runs/sweep-RECIPE-FLAG)
  --overwrite                train all of it again"""


def sweep_command(argv: list[str], parse_train: Callable[[list[str]], RunConfig]) -> None:
    """Runs a sweep from the arguments. `parse_train` is that of `fastmoco train`.

    Raises ConfigError, and whatever a run raises, except where it diverged; the same command then goes on.
    """
    if "-h" in argv or "--help" in argv:
        print(HELP)
        return
    words, recipe = list(argv), "shapes"
    if words and not words[0].startswith("-"):
        recipe = words.pop(0)
    own = entry(recipe)
    vary, out, overwrite, flags = _split(words)
    axes = [Axis.parse(text) for text in vary or ([own.vary] if own.vary else [])]
    if not axes:
        raise ConfigError(f"nothing to vary: give --vary, such as fastmoco sweep {recipe} --vary moco-m=0,0.9,0.99")
    if len({axis.field for axis in axes}) < len(axes):
        raise ConfigError("--vary names a setting twice: give all its values in one, such as moco-m=0,0.9,0.99")
    folder = Path(out or Path("runs") / "-".join(["sweep", recipe, *(axis.field.replace("_", "-") for axis in axes)]))
    cells = plan(axes, lambda own_flags: parse_train([recipe, *flags, *own_flags]), folder)
    check_data(recipe, cells[0].config)
    _train(cells, axes, recipe, shlex.join(["fastmoco", "sweep", *argv]), folder, overwrite)


def _train(cells: list[Cell], axes: Sequence[Axis], recipe: str, command: str, folder: Path, overwrite: bool) -> None:
    from fastmoco.console import make_console, say  # torch takes seconds to load
    from fastmoco.sweep.plot import draw_sweep
    from fastmoco.train import train

    console = make_console()
    number = {cell.name: place for place, cell in enumerate(cells, start=1)}

    def started(cell: Cell, how: str) -> None:
        say(console, f"sweep {number[cell.name]} of {len(cells)}, {how}: {cell.name}")

    try:
        run_sweep(cells, lambda config: train(config, console), started, redo=overwrite)
    finally:
        if folder.is_dir() and any(cell.outcome != "not run" for cell in cells):
            write_json(folder / "sweep.json", recipe, command, cells)
            draw_sweep(cells, axes, folder / "sweep.png")
            print(table(cells, axes))
    print("written " + ", ".join(os.path.relpath(folder / name) for name in ("sweep.json", "sweep.png")))


def _split(words: list[str]) -> tuple[list[str], str | None, bool, list[str]]:
    """The values of --vary, that of --out, whether to --overwrite, and the flags that are left for all runs."""
    vary, out, overwrite, rest = [], None, False, []
    while words:
        word, equals, value = (first := words.pop(0)).partition("=")
        if word in ("--vary", "--out"):
            if not equals:
                if not words:
                    raise ConfigError(f"{word} needs a value")
                value = words.pop(0)
            if word == "--vary":
                vary.append(value)
            else:
                out = value
        elif word == "--overwrite":
            overwrite = True
        elif word == "--resume":
            raise ConfigError("fastmoco sweep resumes by itself: leave --resume out, and give the same --out")
        else:
            rest.append(first)
    return vary, out, overwrite, rest


def table(cells: Sequence[Cell], axes: Sequence[Axis]) -> str:
    """Aligned columns: the settings, kNN before and after or the effective rank, the loss, and the paper's figure."""
    labelled = any(cell.learned_percent is not None for cell in cells)
    tried = any(paper_percent(cell)[0] for cell in cells)
    head = [flag(axis.field).lstrip("-") for axis in axes]
    head += ["kNN before, %", "kNN, %"] if labelled else ["effective rank"]
    head += ["loss", "images/s", "outcome"] + (["the paper's, %"] if tried else [])
    rows = [head]
    for cell in cells:
        found, row = cell.results, list(cell.values.values())
        row += [_number(found.get(n)) for n in ("knn_before_percent", "knn_percent")] if labelled else []
        row += [] if labelled else [_number(found.get("effective_rank"))]
        row += [_number(found.get("loss"), 3), _number(found.get("images_per_s"), 0), cell.outcome]
        if tried:
            known, percent = paper_percent(cell)
            row.append("" if not known else "fails" if percent is None else f"{percent:.1f}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if tried:
        published = PUBLISHED[axes[0].field]
        lines.append(f"the paper's: {published.what} ({published.source})")
    return "\n".join(lines)


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"
