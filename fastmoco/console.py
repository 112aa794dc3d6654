"""What a person sees: a panel at the start, progress while it trains, a summary at the end.

On a terminal the progress is one block that redraws itself when the training reports. Anywhere else, in a file or under
a scheduler, it is plain lines without control characters, few enough to read. No string is read as rich markup, and
characters that could steer a terminal are shown as escapes: names come from the data.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.data.decode import printable

LINES_APART_S = 10.0  # off a terminal, at least
SILENCE_S = 60.0  # and at most, where an epoch takes longer


class Fact(NamedTuple):
    """A row of the start panel or of the summary: what was decided or measured, and why where that helps."""

    name: str
    value: str
    why: str = ""


class StepMetrics(NamedTuple):
    """What the training reports every so many steps; None for what was not measured."""

    loss: float
    lr: float
    images_per_s: float | None = None
    data_wait_percent: float | None = None
    device_memory_bytes: int | None = None
    cpu_threads: int | None = None


def make_console() -> Console:
    """Standard output, where a character that the terminal's encoding lacks becomes an escape and not a crash."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    return Console(highlight=False)


def show_facts(console: Console, title: str, facts: Iterable[Fact]) -> None:
    """A panel of facts, or one line each off a terminal."""
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
    """One line of plain words, above the progress if there is any; never wrapped off a terminal."""
    console.print(Text(printable(line), style), soft_wrap=not console.is_terminal)


class TrainingProgress:
    """The progress of the steps [first_step, steps), for use in a `with`.

    chance_loss is the loss of an encoder that knows nothing, ln(K + 1) a query: shown beside the loss.
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
        self._line_s = clock() - LINES_APART_S
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, metrics: StepMetrics, left_s: float | None = None) -> None:
        """Show the metrics after `done` steps of the whole run, and how long the rest of it takes."""
        now, left = self.clock(), "" if left_s is None else f"{duration(left_s)} left"
        if self._live is not None:
            self._live.update(self._block(done, metrics, left), refresh=True)
            return
        epoch, apart_s = done // self.steps_per_epoch, now - self._line_s
        if done == self.steps or (apart_s >= LINES_APART_S and (epoch > self._line_epoch or apart_s >= SILENCE_S)):
            say(self.console, f"{self._place(done)}  {self._numbers(metrics)}  {left}".rstrip())
            self._line_epoch, self._line_s = epoch, now

    def _block(self, done: int, metrics: StepMetrics, left: str) -> Group:
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, style="dim")
        bar.add_row(self._place(done), ProgressBar(total=self.steps, completed=done), left)
        return Group(bar, Text(self._numbers(metrics)))

    def _place(self, done: int) -> str:
        epochs = -(-self.steps // self.steps_per_epoch)
        epoch = min(done // self.steps_per_epoch, epochs) if done % self.steps_per_epoch == 0 else None
        whole = f"{epoch}" if epoch is not None else f"{done / self.steps_per_epoch:.2f}"
        return f"epoch {whole}/{epochs}  step {done:,}/{self.steps:,}"

    def _numbers(self, metrics: StepMetrics) -> str:
        parts = [f"loss {metrics.loss:.4f} (chance {self.chance_loss:.2f})", f"lr {metrics.lr:.3g}"]
        if metrics.images_per_s is not None:
            parts.append(f"{metrics.images_per_s:,.0f} images/s")
        if metrics.data_wait_percent is not None:
            parts.append(f"data wait {metrics.data_wait_percent:.0f} %")
        if metrics.device_memory_bytes is not None:
            parts.append(f"{metrics.device_memory_bytes / 2**30:.1f} GiB")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """In the two units that matter: `45 s`, `3 min 20 s`, `1 h 05 min`, `2 d 03 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def summary_facts(
    *,
    minutes: float,
    images_per_s: float,
    knn_before_percent: float | None,
    knn_after_percent: float | None,
    raw_pixels_percent: float | None,
    files: Iterable[str],
) -> list[Fact]:
    """The rows of the summary: what the training was worth, what it took and what it left behind."""
    facts = []
    if knn_after_percent is not None:
        before = "" if knn_before_percent is None else f"{knn_before_percent:.1f} % → "
        raw = "" if raw_pixels_percent is None else f"raw pixels: {raw_pixels_percent:.1f} %"
        facts.append(Fact("kNN top-1", f"{before}{knn_after_percent:.1f} %", raw))
    facts.append(Fact("time", duration(60 * minutes)))
    facts.append(Fact("speed", f"{images_per_s:,.0f} images/s"))
    facts.extend(Fact("written" if number == 0 else "", file) for number, file in enumerate(files))
    return facts
