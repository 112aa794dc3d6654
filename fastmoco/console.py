"""Terminal output: settings at the start, progress during training, a summary at the end.

On a terminal, progress is a block that is redrawn at every update. Elsewhere, in a file or under a scheduler, it is a
few plain lines without control characters. Names come from the data, so no string is parsed as rich markup, and control
characters are escaped. With --quiet and --json the console of a command has another `Form`.
"""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, NamedTuple, Self, cast

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from fastmoco.output import Form, LossyOutput, output_form, write_event
from pipelines.data.printable import printable

# Time between two progress lines that are not on a terminal.
MIN_LINE_INTERVAL_S = 10.0
MAX_LINE_INTERVAL_S = 60.0  # for epochs that take longer


class Fact(NamedTuple):
    """A row of the settings or of the summary; `why` is the reason for the value, if worth showing."""

    name: str
    value: str
    why: str = ""


class StepMetrics(NamedTuple):
    """Metrics reported every `log_every` steps; None if not measured."""

    loss: float
    lr: float
    images_per_s: float | None = None
    data_wait_percent: float | None = None
    device_memory_bytes: int | None = None
    cpu_threads: int | None = None
    device_power_w: float | None = None


class FormConsole(Console):
    """A console whose output is in the form that the command was asked for."""

    def __init__(self, stream: IO[str], form: Form) -> None:
        super().__init__(
            highlight=False,
            file=stream,
            quiet=form == Form.QUIET,
            force_terminal=False if form == Form.JSON else None,
        )
        self.form = form


def make_console(*, is_log: bool = False) -> Console:
    """Console of a command, which escapes characters that the terminal's encoding lacks.

    is_log  whether lines that a full disk does not take are lost, instead of an OSError: all results are in files
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with suppress(OSError):  # of a full disk, to which something has been printed before
                reconfigure(errors="backslashreplace")
    form = output_form()
    stream = sys.stderr if form == Form.JSON else sys.stdout
    return FormConsole(cast(IO[str], LossyOutput(stream, is_log)), form)


def form_of(console: Console) -> Form:
    """The form of what is printed on a console."""
    return console.form if isinstance(console, FormConsole) else Form.TEXT


def emit(console: Console, event: str, **values: Any) -> None:
    """With --json, print a line with these values on standard output; otherwise nothing."""
    if form_of(console) == Form.JSON:
        write_event(event, values)


def show_result(console: Console, title: str, facts: Sequence[Fact], **values: Any) -> None:
    """Print the result of a command: facts as `show_facts`, one line with --quiet, with --json the values."""
    if form_of(console) == Form.QUIET:
        shown = ", ".join(printable(f"{fact.name} {fact.value}".strip()) for fact in facts)
        print(f"{title}: {shown}", flush=True)
    show_facts(console, title, facts)
    emit(console, "result", **values)


def show_facts(console: Console, title: str, facts: Iterable[Fact]) -> None:
    """Print facts as one line each; on a terminal that is too narrow, the reasons follow on lines of their own.

    Values are never broken or framed, so that a path or a command is copied as it is.
    """
    rows = [Fact(*(printable(text) for text in fact)) for fact in facts]
    width = max((len(row.name) for row in rows), default=0)
    say(console, title, "bold")
    for row in rows:
        value, why = f"  {row.name:<{width}}  {row.value}", f"({row.why})" if row.why else ""
        fits = not console.is_terminal or cell_len(f"{value}  {why}") <= console.width
        line = Text(f"{value}  {why}" if why and fits else value)
        line.stylize("cyan", 0, 2 + len(row.name))
        line.stylize("dim", len(value))
        console.print(line, soft_wrap=True)
        if why and not fits:
            indent = " " * (width + 4)
            wrapped = textwrap.wrap(
                why, max(20, console.width - len(indent)), break_long_words=False, break_on_hyphens=False
            )
            console.print(Text("\n".join(indent + part for part in wrapped), "dim"), soft_wrap=True)


def say(console: Console, line: str, style: str = "") -> None:
    """Print one line, above the progress block if there is one; the terminal wraps it, so that it is copied whole.

    Yellow is the style of warnings, which are printed with --quiet too.
    """
    if style == "yellow" and form_of(console) == Form.QUIET:
        print(printable(line), file=sys.stderr, flush=True)
    console.print(Text(printable(line), style), soft_wrap=True)


class TrainingProgress:
    """Progress of the steps [first_step, steps), for use in a `with`.

    chance_loss  the loss at chance level, ln(K + 1) per query, shown beside the loss
    """

    def __init__(
        self,
        console: Console,
        *,
        first_step: int,
        steps: int,
        steps_per_epoch: int,
        chance_loss: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.chance_loss = chance_loss
        self.clock = clock
        self._line_epoch = first_step // steps_per_epoch
        self._line_s = clock() - MIN_LINE_INTERVAL_S
        self._block: _ProgressBlock | None = None
        if console.is_terminal:
            self._block = _ProgressBlock(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[left]}", style="dim", markup=False),
                console=console,
                auto_refresh=False,
                expand=True,
            )
            self._task = self._block.add_task(
                self._position(first_step), total=steps, completed=first_step, left="", metrics=""
            )

    def __enter__(self) -> Self:
        if self._block is not None:
            self._block.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._block is not None:
            self._block.stop()

    def update(self, done: int, metrics: StepMetrics, left_s: float | None = None) -> None:
        """Show the metrics after `done` steps of the whole run, and the seconds left, if known."""
        position, values = self._position(done), self._format(metrics)
        left = "" if left_s is None else f"{duration(left_s)} left"
        if self._block is not None:
            self._block.update(
                self._task, completed=done, description=position, left=left, metrics=values, refresh=True
            )
            return
        now = self.clock()
        epoch, elapsed_s = done // self.steps_per_epoch, now - self._line_s
        if done == self.steps or (
            elapsed_s >= MIN_LINE_INTERVAL_S and (epoch > self._line_epoch or elapsed_s >= MAX_LINE_INTERVAL_S)
        ):
            say(self.console, f"{position}  {values}  {left}".rstrip())
            self._line_epoch, self._line_s = epoch, now

    def _position(self, done: int) -> str:
        epochs = -(-self.steps // self.steps_per_epoch)
        if done % self.steps_per_epoch == 0:
            epoch = f"{min(done // self.steps_per_epoch, epochs)}"
        else:
            epoch = f"{done / self.steps_per_epoch:.2f}"
        return f"epoch {epoch}/{epochs}  step {done:,}/{self.steps:,}"

    def _format(self, metrics: StepMetrics) -> str:
        fields = [f"loss {metrics.loss:.4f} (chance {self.chance_loss:.2f})", f"lr {short(metrics.lr)}"]
        if metrics.images_per_s is not None:
            fields.append(f"{metrics.images_per_s:,.0f} images/s")
        if metrics.data_wait_percent is not None:
            fields.append(f"data wait {metrics.data_wait_percent:.0f} %")
        if metrics.device_memory_bytes is not None:
            fields.append(f"{metrics.device_memory_bytes / 2**30:.1f} GiB")
        return "  ".join(fields)


class _ProgressBlock(Progress):
    """A progress bar with the metrics of its task on a line below."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["metrics"])


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path relative to the current folder, or absolute on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:  # on Windows
        return os.path.abspath(path)


def counted(number: int, noun: str) -> str:
    """A number of things: `1 thread`, `2,000 images`."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def short(value: float) -> str:
    """A number with three significant digits, without an exponent where it is large: `1,000`, not `1e+03`."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def resume_command(run: str | os.PathLike[str]) -> str:
    """What to type in this folder to go on with a run that has stopped."""
    return f"fastmoco train --resume {shlex.quote(shown_path(run))}"


def duration(seconds: float) -> str:
    """Time in its two largest units: `45 s`, `3 min 20 s`, `1 h 05 min`, `2 d 03 h`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60:02d} min"
    return f"{total // 86400} d {total % 86400 // 3600:02d} h"


def summary_facts(
    *,
    minutes: float,
    images_per_s: float,
    knn_before_percent: float | None,
    knn_after_percent: float | None,
    raw_pixels_percent: float | None,
    files: Iterable[str],
) -> list[Fact]:
    """Rows of the final summary: accuracy before and after, time, speed and written files."""
    facts = []
    if knn_after_percent is not None:
        before = "" if knn_before_percent is None else f"{knn_before_percent:.1f} % → "
        raw = "" if raw_pixels_percent is None else f"raw pixels: {raw_pixels_percent:.1f} %"
        facts.append(Fact("kNN top-1", f"{before}{knn_after_percent:.1f} %", raw))
    facts.append(Fact("time", duration(60 * minutes)))
    facts.append(Fact("speed", f"{images_per_s:,.0f} images/s"))
    facts.extend(Fact("written" if number == 0 else "", file) for number, file in enumerate(files))
    return facts
