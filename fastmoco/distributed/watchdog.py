"""Ends a process that has stopped making progress, as its peers wait for it or it for them."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fastmoco.errors import ExitCode

_AFTER_SIGNAL_S = 15.0  # torchrun kills 30 s after the signal that it passes on
_LAST_WORDS_S = 2.0


class Watchdog:
    """While it is watching and not paused, `feed` must be called at least every `timeout_s` seconds.

    Otherwise the stacks of all threads go to stderr, `last_words` is called with a sentence, and the process ends with
    75, resumable: a thread that waits inside of a library, as NCCL's does, cannot be interrupted in another way.

    stopping  whether the run was asked to stop, after which there is less time
    """

    def __init__(self, timeout_s: float, last_words: Callable[[str], None], stopping: Callable[[], bool]) -> None:
        self._timeout_s, self._last_words, self._stopping = timeout_s, last_words, stopping
        self._fed = time.monotonic()
        self._paused = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @contextmanager
    def watching(self, needed: bool = True) -> Iterator[None]:
        """Watches what happens inside, where that is needed at all."""
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
        """What happens inside may take any time."""
        self._paused = True
        try:
            yield
        finally:
            self.feed()
            self._paused = False

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout_s / 10)):
            limit = min(self._timeout_s, _AFTER_SIGNAL_S) if self._stopping() else self._timeout_s
            silent = time.monotonic() - self._fed
            if silent > limit and not self._paused:
                self._end(f"no step in {silent:.0f} s: this rank or another has stalled; resume with --resume")

    def _end(self, message: str) -> None:
        with suppress(OSError, ValueError):  # whatever has become of stderr
            faulthandler.dump_traceback(all_threads=True)
            print(f"fastmoco: stopped: {message}", file=sys.stderr, flush=True)
        words = threading.Thread(target=self._last_words, args=(message,), daemon=True)
        words.start()
        words.join(_LAST_WORDS_S)  # a disk or a store that does not answer must not keep us
        os._exit(ExitCode.PREEMPTED)
