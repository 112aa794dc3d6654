"""Terminal output: a panel at the start, progress during training, a summary at the end.

On a terminal, progress is a block that is redrawn at every update. Elsewhere, in a file or under a scheduler, it is a
few plain lines without control characters. Names come from the data, so no string is parsed as rich markup, and control
characters are escaped.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any, NamedTuple, Self, TextIO, cast

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from pipelines.data.decode import printable
from pipelines.files import is_full
from pipelines.platforms import silence

# Time between two progress lines that are not on a terminal.
MIN_LINE_INTERVAL_S = 10.0
MAX_LINE_INTERVAL_S = 60.0  # for epochs that take longer


class Fact(NamedTuple):
    """A row of the start panel or of the summary; `why` is the reason for the value, if worth showing."""

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


class _Output:
    """Standard output that may be lost: what is printed after its terminal was closed.

    That of a log also where the disk is full, or the program that read it has ended.
    """

    def __init__(self, stream: TextIO, is_log: bool) -> None:
        self._stream, self._is_log = stream, is_log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.EIO or (self._is_log and error.errno == errno.EPIPE):
                silence(self._stream.fileno())
            elif not (self._is_log and is_full(error)):
                raise


def make_console(*, is_log: bool = False) -> Console:
    """Console on standard output that escapes characters which the terminal's encoding lacks.

    is_log  whether lines that cannot be written are lost, instead of an OSError: all results are in files
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    may_be_lost = is_log or sys.stdout.isatty()
    return Console(highlight=False, file=cast(IO[str], _Output(sys.stdout, is_log)) if may_be_lost else None)


def show_facts(console: Console, title: str, facts: Iterable[Fact]) -> None:
    """Print facts as a panel on a terminal, else as one line each."""
    rows = [Fact(*(printable(text) for text in fact)) for fact in facts]
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(style="dim", overflow="fold")
        for row in rows:
            table.add_row(*(Text(text) for text in row))
        console.print(Panel(table, title=Text(printable(title)), title_align="left", expand=False))
        return
    width = max((len(row.name) for row in rows), default=0)
    say(console, title)
    for row in rows:
        say(console, f"  {row.name:<{width}}  {row.value}" + (f"  ({row.why})" if row.why else ""))


def say(console: Console, line: str, style: str = "") -> None:
    """Print one line, above the progress block if there is one; wrapped only on a terminal."""
    console.print(Text(printable(line), style), soft_wrap=not console.is_terminal)


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
        fields = [f"loss {metrics.loss:.4f} (chance {self.chance_loss:.2f})", f"lr {metrics.lr:.3g}"]
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
