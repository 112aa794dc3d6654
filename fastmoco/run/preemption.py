"""What SIGTERM, SIGINT and SIGHUP do: they end a command at once, or set a flag that the training loop checks.

A step or a save must not be interrupted, and the loop checks the flag after each. All else that takes long, such as
reading a data set, an evaluation or an export, is interrupted where it is: by an exception, so that files are closed,
temporary ones deleted and processes ended. There is nothing to poll, and nothing that a long loop could forget.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from fastmoco.errors import Interrupted, Preempted
from pipelines.platforms import silence

COPIES_S = 2.0
_SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class StopFlag:
    """Set by the first signal inside its `with` block, which ends with Preempted; a second ends the process at once.

    The first also raises Interrupted in the main thread, except inside `deferred`, where it says at once that the step
    ends first: a step may take minutes on a CPU. SIGHUP, the end of the terminal, is
    left alone where it is ignored, as under nohup. Copies of the first signal within COPIES_S are one with it: a
    signal to the whole process group arrives once by itself and once more from a launcher that forwards it, as `uv run`
    does.

    launched      ignore copies of the first signal however late they are: under torchrun, a rank gets it from the
                  scheduler and again from torchrun, which forwards its own
    before_exit   called with a message and the exit code before a second signal ends the process
    """

    def __init__(self, *, launched: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self.before_exit: Callable[[str, int], None] | None = None
        self._copies_s = float("inf") if launched else COPIES_S
        self._first_at = 0.0
        self._interrupts = True
        self._previous: dict[signal.Signals, object] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopFlag:
        for number in _SIGNALS:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        if isinstance(error, Interrupted):
            raise Preempted(str(error)) from None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals only set the flag in this block."""
        with self._interrupting(False):
            yield

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Signals interrupt this block, though it is inside `deferred`. Raises Interrupted."""
        with self._interrupting(True):
            yield

    @contextmanager
    def _interrupting(self, interrupts: bool) -> Iterator[None]:
        before, self._interrupts = self._interrupts, interrupts
        try:
            if interrupts and self.signal is not None:
                raise self._interrupted()
            yield
        finally:
            self._interrupts = before

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            if self.signal != number or time.monotonic() - self._first_at > self._copies_s:
                self._exit(signal.Signals(number))
            return
        self.signal, self._first_at = signal.Signals(number), time.monotonic()
        if self.name == "SIGHUP":
            for descriptor in self._terminals:  # there is nobody to read what is still printed, which would fail
                silence(descriptor)
        if self._interrupts:
            raise self._interrupted()
        self._acknowledge()

    def _acknowledge(self) -> None:
        """Say on standard error that the signal has arrived; written directly, since a print may be interrupted."""
        line = f"fastmoco: {self.name}: stopping when this step is done and saved; another signal ends it at once\n"
        if self.name != "SIGHUP" and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, ("\n" * (2 in self._terminals) + line).encode())

    def _exit(self, second: signal.Signals) -> None:
        code = 128 + second
        try:
            if self.before_exit is not None:
                self.before_exit(f"ended by {self.name} and then {second.name}, before the state was saved", code)
        finally:
            os._exit(code)

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped by {self.name} with nothing to save: start again")

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Name of the signal, such as SIGTERM."""
        return self.signal.name if self.signal is not None else "no signal"
