"""`fastmoco watch`: a run, or all runs of a folder, followed from another terminal. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastmoco.commands.watch_options import WatchOptions
from fastmoco.console import Fact, duration, emit, make_console, say, show_result, shown_path
from fastmoco.errors import AlreadyReportedError, ConfigError, ExitCode, Interrupted
from fastmoco.run.follow import FollowedRun, is_run, runs_in
from fastmoco.run.sparkline import sparkline
from pipelines.data.printable import printable
from pipelines.files import absolute

_SILENT_S = 120.0  # a running run that has written nothing for so long may have been killed
_LABEL, _SPARK = 10, 32  # width in characters


def watch_command(
    options: WatchOptions, sleep: Callable[[float], None] = time.sleep, console: Console | None = None
) -> None:
    """Follow until the run ends or Ctrl-C. Raises ConfigError, and AlreadyReportedError with the run's exit code."""
    console, folder = console or make_console(), Path(absolute(options.run))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{options.run} is a file, expected the folder of a run, or one of several runs")
    try:
        if not is_run(folder) and (runs_in(folder) or options.once):
            _watch_folder(folder, options, sleep, console)
        else:
            _watch_run(FollowedRun(folder), options, sleep, console)
    except Interrupted:
        return  # Ctrl-C is how to leave


# ---- one run ---------------------------------------------------------------------------------------------------------


def _watch_run(run: FollowedRun, options: WatchOptions, sleep: Callable[[float], None], console: Console) -> None:
    if options.once:
        run.update()
        console.print(_block(run, console)) if console.is_terminal else say(console, line_of(run))
        emit(console, "state", **values_of(run))
        return
    if not console.is_terminal:
        _follow_in_lines(run, options, sleep, console)
    else:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                run.update()
                live.update(_block(run, console), refresh=True)
                if run.has_ended:
                    break
                sleep(options.interval)
    _end(run, console)


def _follow_in_lines(run: FollowedRun, options: WatchOptions, sleep: Callable[[float], None], console: Console) -> None:
    """A line whenever there is something new."""
    shown = ""
    while not run.has_ended:
        run.update()
        line = line_of(run)
        if line != shown and not run.has_ended:
            say(console, line)
            emit(console, "state", **values_of(run))
            shown = line
        if not run.has_ended:
            sleep(options.interval)


def _end(run: FollowedRun, console: Console) -> None:
    """Say how the run has ended. Raises AlreadyReportedError unless it is done."""
    facts = [Fact("", line_of(run))]
    if run.text("message"):
        facts.append(Fact("", run.text("message")))
    if not console.is_terminal or console.quiet:  # otherwise the block has it all
        show_result(console, shown_path(run.folder), facts, **values_of(run))
    code = run.status.get("exit_code")
    if code != ExitCode.DONE:
        raise AlreadyReportedError(code if isinstance(code, int) else 1)


def values_of(run: FollowedRun) -> dict[str, Any]:
    """What --json prints of a run."""
    keys = ("exit_code", "message", "steps", "chance_loss")
    status = {name: run.status[name] for name in keys if name in run.status}
    return {"run": str(run.folder), "state": run.state} | status | run.latest | {"step": run.step}


def line_of(run: FollowedRun) -> str:
    """A run in one line: state, position, loss, kNN accuracy, speed and time left."""
    if not run.exists:
        return f"waiting for {shown_path(run.folder)}, which has not begun"
    return "  ".join(filter(None, [run.state, _position(run), *_numbers(run), _left(run), run.text("verdict")]))


def _block(run: FollowedRun, console: Console) -> RenderableType:
    """A run as a block of lines, at most as wide as the terminal."""
    title = Text(printable(f"{shown_path(run.folder)}: {run.state}"), "bold")
    if not run.exists:
        return Text(line_of(run), "yellow")
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="cyan", no_wrap=True, min_width=_LABEL)
    rows.add_column(overflow="fold")
    steps = run.steps
    if steps:
        rows.add_row("", ProgressBar(total=steps, completed=run.step, width=min(_SPARK, console.width - 14)))
    rows.add_row("position", Text("  ".join(filter(None, [_position(run), _left(run)]))))
    for name, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("knn_top1_percent", "kNN top-1", "{:.1f} %"),
        ("effective_rank", "eff. rank", "{:.1f}"),
    ):
        series = run.series[name]
        if series:
            now = form.format(series[-1])
            beside = f" (chance {run.chance_loss:.2f})" if name == "loss" and run.chance_loss is not None else ""
            line = sparkline(series, min(_SPARK, console.width - 40), ascii_only=console.options.ascii_only)
            rows.add_row(label, Text(f"{line}  {now}{beside}"))
    if speed := _speed(run):
        rows.add_row("speed", Text("  ".join(speed)))
    for name in ("verdict", "remedy"):
        if run.text(name):
            rows.add_row(name, Text(printable(run.text(name))))
    silent_s = run.silent_s()
    if not run.has_ended and silent_s is not None:
        old = silent_s > _SILENT_S
        note = "; it may have been killed" if old else ""
        rows.add_row("last news", Text(f"{duration(silent_s)} ago{note}", "yellow" if old else "dim"))
    if run.has_ended and run.text("message"):
        rows.add_row("message", Text(printable(run.text("message"))))
    return Group(title, rows)


def _position(run: FollowedRun) -> str:
    epochs, total = run.epochs, run.config("optim", "epochs")
    of_steps = f"/{run.steps:,}" if run.steps else ""
    position = f"step {run.step:,}{of_steps}"
    if epochs is None:
        return position
    return f"epoch {epochs:.2f}" + (f"/{total}" if isinstance(total, int) else "") + f"  {position}"


def _numbers(run: FollowedRun) -> list[str]:
    parts = []
    if (loss := run.number("loss")) is not None:
        chance = "" if run.chance_loss is None else f" (chance {run.chance_loss:.2f})"
        parts.append(f"loss {loss:.4f}{chance}")
    if (knn := run.number("knn_top1_percent")) is not None:
        parts.append(f"kNN {knn:.1f} %")
    return parts + _speed(run)


def _speed(run: FollowedRun) -> list[str]:
    parts = []
    if (rate := run.number("images_per_s")) is not None:
        parts.append(f"{rate:,.0f} images/s")
    if (wait := run.number("data_wait_percent")) is not None:
        parts.append(f"data wait {wait:.0f} %")
    if memory := run.number("device_memory_bytes"):
        parts.append(f"{memory / 2**30:.1f} GiB")
    return parts


def _left(run: FollowedRun) -> str:
    batch = run.config("optim", "batch_size")
    left = run.left_s(batch if isinstance(batch, int) else None)
    return "" if left is None else f"about {duration(left)} left"


# ---- a folder of runs ------------------------------------------------------------------------------------------------


def _watch_folder(folder: Path, options: WatchOptions, sleep: Callable[[float], None], console: Console) -> None:
    """List all runs of a folder, until all have ended."""
    known: dict[Path, FollowedRun] = {}

    def look() -> list[FollowedRun]:
        for path in runs_in(folder):
            known.setdefault(path, FollowedRun(path)).update()
        return list(known.values())

    runs = look()
    if not runs:
        say(console, f"no run in {shown_path(folder)} yet")
    elif options.once or not console.is_terminal:
        for run in runs:
            say(console, f"{shown_path(run.folder)}: {line_of(run)}")
    else:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_table(runs, folder), refresh=True)
                if all(run.has_ended for run in runs):
                    break
                sleep(options.interval)
                runs = look()
    emit(console, "result", runs=[values_of(run) for run in runs])


def _table(runs: Sequence[FollowedRun], folder: Path) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state"):
        table.add_column(name, overflow="fold")
    for name in ("epoch", "loss", "kNN %", "images/s", "left"):
        table.add_column(name, justify="right")
    for run in runs:
        loss, knn, rate = (run.number(name) for name in ("loss", "knn_top1_percent", "images_per_s"))
        total = run.config("optim", "epochs")
        position = f"{run.step:,}" if run.epochs is None else f"{run.epochs:.1f}/{total}"
        cells = [
            printable(os.path.relpath(run.folder, folder)),
            run.text("verdict") if run.state == "running" and run.text("verdict") else run.state,
            position,
            "" if loss is None else f"{loss:.3f}",
            "" if knn is None else f"{knn:.1f}",
            "" if rate is None else f"{rate:,.0f}",
            _left(run).removeprefix("about ").removesuffix(" left"),
        ]
        table.add_row(*(Text(cell) for cell in cells))
    return table
