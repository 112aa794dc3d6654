"""SIGTERM and SIGINT become a flag that the training loop looks at after every step."""

from __future__ import annotations

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """While it is entered, the first signal asks for a stop; a second one ends the process at once.

    With `repeats`, the first one may come again: a scheduler sends it to every process, and torchrun, which has it too,
    passes it on to those it has started.
    """

    def __init__(self, *, repeats: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._repeats = repeats
        self._earlier: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        for number in _SIGNALS:
            self._earlier[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and not (self._repeats and self.signal == number):
            os._exit(128 + number)
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Of the signal, such as SIGTERM."""
        return self.signal.name if self.signal is not None else "no signal"
