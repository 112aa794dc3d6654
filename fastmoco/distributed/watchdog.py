"""Watchdog that ends a process whose training has stalled, because ranks wait for each other."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fastmoco.errors import ExitCode

_AFTER_SIGNAL_S = 15.0  # torchrun sends SIGKILL 30 s after the signal that it forwards
_REPORT_S = 2.0


class Watchdog:
    """While it is watching and not paused, `feed` must be called at least every `timeout_s` seconds.

    Otherwise it prints the stacks of all threads to stderr, calls `report` with a message, and exits with 75
    (resumable): a thread that blocks inside a library such as NCCL cannot be interrupted in another way.

    stopping  whether the run has received a signal, after which the limit is shorter
    """

    def __init__(self, timeout_s: float, report: Callable[[str], None], stopping: Callable[[], bool]) -> None:
        self._timeout_s, self._report, self._stopping = timeout_s, report, stopping
        self._fed = time.monotonic()
        self._paused = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @contextmanager
    def watching(self, needed: bool = True) -> Iterator[None]:
        """Watch the block, if `needed`."""
        self.feed()
        if needed:
            self._thread.start()
        try:
            yield
        finally:
            self._ended.set()

    def feed(self) -> None:
        self._fed = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the limit inside the block."""
        self._paused = True
        try:
            yield
        finally:
            self.feed()
            self._paused = False

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout_s / 10)):
            limit = min(self._timeout_s, _AFTER_SIGNAL_S) if self._stopping() else self._timeout_s
            elapsed = time.monotonic() - self._fed
            if elapsed > limit and not self._paused:
                self._end(f"no step in {elapsed:.0f} s: this rank or another has stalled; resume with --resume")

    def _end(self, message: str) -> None:
        with suppress(OSError, ValueError):  # stderr may be closed
            faulthandler.dump_traceback(all_threads=True)
            print(f"fastmoco: stopped: {message}", file=sys.stderr, flush=True)
        report = threading.Thread(target=self._report, args=(message,), daemon=True)
        report.start()
        report.join(_REPORT_S)  # an unresponsive disk or store must not delay the exit
        os._exit(ExitCode.PREEMPTED)
