"""Handlers that turn SIGTERM and SIGINT into a flag, which the training loop checks after every step."""

from __future__ import annotations

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Set by the first signal inside its `with` block; a second signal ends the process at once.

    repeats  ignore repetitions of the first signal: under torchrun, a rank gets it from the scheduler and again from
             torchrun, which forwards its own
    """

    def __init__(self, *, repeats: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._repeats = repeats
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and not (self._repeats and self.signal == number):
            os._exit(128 + number)
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """Name of the signal, such as SIGTERM."""
        return self.signal.name if self.signal is not None else "no signal"
