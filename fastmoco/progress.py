"""Progress of anything long whose work can be counted: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmoco.console import duration, emit, say
from pipelines.data.printable import printable

LINE_INTERVAL_S = 10.0  # between lines that are not on a terminal; nothing shorter prints any

T = TypeVar("T")


@contextmanager
def reported(console: Console, what: str, unit: str = "files") -> Iterator[Callable[[int, int], None]]:
    """A function to be called with what is done and the total of it: `load_dataset(..., progress=report)`.

    It may begin again, with another total.
    """
    with ExitStack() as stack:
        counted: Counted | None = None
        so_far = of = 0

        def report(done: int, total: int) -> None:
            nonlocal counted, so_far, of
            if counted is None or total != of or done < so_far:
                stack.close()
                counted, so_far, of = stack.enter_context(Counted(console, what, total, unit)), 0, total
            counted.advance(done - so_far)
            so_far = done

        yield report


class Counted:
    """Counts work towards a total, for use in a `with`; the bar disappears at the end.

    what, unit  `features of cifar10/train` and `images`: what is made, and what is counted
    """

    def __init__(
        self,
        console: Console,
        what: str,
        total: int,
        unit: str = "images",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._what, self._total, self._unit, self._clock = console, what, total, unit, clock
        self._began = self._line_at = clock()
        self._done, self._note = 0, ""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal or console.quiet
        )
        self._task = self._bar.add_task(printable(what), total=total, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done. A note, such as `3 bad`, is shown until there is another."""
        self._done, self._note = min(self._done + count, self._total), note or self._note
        now = self._clock()
        rate = self._done / max(now - self._began, 1e-9)
        shown = ", ".join(filter(None, [f"{rate:,.0f} {self._unit}/s" if rate >= 1 else "", self._note]))
        self._bar.update(self._task, completed=self._done, rate=shown)
        if self._console.is_terminal or now - self._line_at < LINE_INTERVAL_S or self._done == self._total:
            return
        self._line_at = now
        left = f"{duration((self._total - self._done) / rate)} left" if self._done else ""
        parts = [f"{self._done:,} of {self._total:,} {self._unit}", shown, left]
        say(self._console, f"{self._what}: " + ", ".join(filter(None, parts)))
        emit(self._console, "progress", what=self._what, unit=self._unit, done=self._done, total=self._total)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; each counts as one."""
        for item in items:
            yield item
            self.advance()
