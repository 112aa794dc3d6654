"""`fastmoco sweep`: one run for each value of a setting, with a table, a plot and a JSON file of the results."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from fastmoco.commands.train_arguments import train_arguments
from fastmoco.config import RunConfig
from fastmoco.config.arguments import read, written
from fastmoco.config.checks import flag
from fastmoco.config.fields import options_of
from fastmoco.config.flags import HELP, Argument, flags_of
from fastmoco.config.help import flags_help
from fastmoco.errors import CheckpointError, ConfigError, Preempted, cannot_write
from fastmoco.output import announce
from fastmoco.recipes import PUBLISHED, check_data, entry, recipe_and_data
from fastmoco.sweep.runs import Axis, Cell, paper_percent, plan, run_sweep, write_json

USAGE = """usage: fastmoco sweep [RECIPE] [DATA] --vary FLAG=VALUE,VALUE [FLAGS]

Train RECIPE once for each value of a flag of `fastmoco train`; several --vary
make a grid. FLAGS are those of `fastmoco train` and apply to all runs. The same
command again resumes the sweep: finished runs are skipped, an interrupted run
is resumed. Without --vary, an ablation recipe (see fastmoco recipes) varies its
own setting.

  fastmoco sweep shapes --vary moco-m=0,0.9,0.99
  fastmoco sweep ~/photos --vary mlp=true,false --vary moco-t=0.07,0.2

  --vary FLAG=VALUE,VALUE Values; true or false for a switch, + between the
                          numbers of one value (head=100+50,512)
  --out FOLDER            Folder of the runs, sweep.json and sweep.png
                          [runs/sweep-RECIPE-FLAG]
  --overwrite             Train all runs again

All flags: fastmoco sweep --help-all, or fastmoco train --help"""


def sweep_command(argv: list[str]) -> None:
    """Run a sweep.

    Raises ConfigError, and any error of a run except divergence; the same command then resumes the sweep.
    """
    if requested := {*HELP} & {*argv}:
        print(USAGE)
        if HELP[-1] in requested:
            print("\n" + flags_help(options_of(RunConfig), everything=True))
        return
    words, vary, out, overwrite, flags = _split(read(argv, flags_of(RunConfig).and_value("--vary"), "sweep"))
    name, data = recipe_and_data(words)
    if not data:
        words = [name := name or "shapes"]
    default_vary = "" if name is None else entry(name).vary
    recipe = name or Path(data[0]).name
    axes = [Axis.parse(text) for text in vary or ([default_vary] if default_vary else [])]
    if not axes:
        raise ConfigError(f"nothing to vary: give --vary, such as fastmoco sweep {recipe} --vary moco-m=0,0.9,0.99")
    if len({axis.field for axis in axes}) < len(axes):
        raise ConfigError("--vary names a setting twice: give all its values at once, such as moco-m=0,0.9,0.99")
    folder = Path(out or Path("runs") / "-".join(["sweep", recipe, *(axis.field.replace("_", "-") for axis in axes)]))

    def parse(of_cell: list[str]) -> tuple[RunConfig, frozenset[str]]:
        given = train_arguments([*words, *flags, *of_cell])
        return given.config, given.from_recipe

    cells = plan(axes, parse, folder)
    if name is not None:
        check_data(name, cells[0].config)
    announce(f"{len(cells)} runs on {', '.join(cells[0].config.data.data)}", is_log=True)
    _train(cells, axes, recipe, shlex.join(["fastmoco", "sweep", *argv]), folder, overwrite)


def _train(cells: list[Cell], axes: Sequence[Axis], recipe: str, command: str, folder: Path, overwrite: bool) -> None:
    from rich.text import Text

    from fastmoco.console import Fact, make_console, say, show_result, shown_path  # imports torch, which takes seconds
    from fastmoco.sweep.plot import draw_sweep
    from fastmoco.trainer import train

    console = make_console(is_log=True)
    number = {cell.name: i for i, cell in enumerate(cells, start=1)}

    def on_start(cell: Cell, mode: str) -> None:
        say(console, f"sweep {number[cell.name]} of {len(cells)}, {mode}: {cell.name}")

    def report() -> None:
        """Print and write the results so far. Raises ConfigError or CheckpointError if they cannot be written."""
        if folder.is_dir() and any(cell.outcome != "not run" for cell in cells):
            try:
                write_json(folder / "sweep.json", recipe, command, cells)
                draw_sweep(cells, axes, folder / "sweep.png")
            except OSError as error:
                raise cannot_write(Path(error.filename or folder), error) from error
            finally:
                console.print(Text(table(cells, axes)), soft_wrap=True)

    try:
        run_sweep(cells, lambda config, from_recipe: train(config, console, from_recipe), on_start, redo=overwrite)
    except BaseException as ended:
        try:
            report()
        except (ConfigError, CheckpointError) as error:  # must not hide the error of the run
            say(console, str(error), "yellow")
        if isinstance(ended, Preempted):
            raise Preempted(f"{str(ended).partition(': ')[0]}: resume with: {command}") from ended
        raise
    report()
    files = ", ".join(shown_path(folder / name) for name in ("sweep.json", "sweep.png"))
    show_result(
        console,
        "done",
        [Fact("written", files)],
        folder=str(folder),
        runs=[{"name": cell.name, "outcome": cell.outcome, **cell.values, **cell.results} for cell in cells],
    )


def _split(arguments: Sequence[Argument]) -> tuple[list[str], list[str], str | None, bool, list[str]]:
    """Words without a flag, values of --vary, value of --out, whether --overwrite is given, and flags for all runs."""
    words, vary, out, overwrite, flags = [], [], None, False, []
    for argument in arguments:
        if not argument.flag:
            words += argument.values
        elif argument.flag == "--vary":
            vary += argument.values
        elif argument.flag == "--out":
            out = argument.values[0]
        elif argument.flag == "--overwrite":
            overwrite = True
        elif argument.flag == "--resume":
            raise ConfigError("fastmoco sweep resumes by itself: remove --resume, and use the same --out")
        else:
            flags.append(argument)
    return words, vary, out, overwrite, written(flags)


def table(cells: Sequence[Cell], axes: Sequence[Axis]) -> str:
    """Results as text: settings, kNN accuracy before and after or effective rank, loss, speed, published result."""
    labelled = any(cell.knn_percent is not None for cell in cells)
    published = any(paper_percent(cell)[0] for cell in cells)
    header = [flag(axis.field).lstrip("-") for axis in axes]
    header += ["kNN before, %", "kNN, %"] if labelled else ["effective rank"]
    header += ["loss", "images/s", "outcome"] + (["paper, %"] if published else [])
    rows = [header]
    for cell in cells:
        results, row = cell.results, list(cell.values.values())
        row += [_number(results.get(n)) for n in ("knn_before_percent", "knn_percent")] if labelled else []
        row += [] if labelled else [_number(results.get("effective_rank"))]
        row += [_number(results.get("loss"), 3), _number(results.get("images_per_s"), 0), cell.outcome]
        if published:
            in_paper, percent = paper_percent(cell)
            row.append("" if not in_paper else "fails" if percent is None else f"{percent:.1f}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if published:
        paper = PUBLISHED[axes[0].field]
        lines.append(f"paper: {paper.what} ({paper.source})")
    return "\n".join(lines)


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"
