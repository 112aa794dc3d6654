"""Figures as text, and the time of a call on a device."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable

MIN_S = 0.15  # of a measurement
MAX_CALLS = 10_000


def one_line(text: str, characters: int = 240) -> str:
    """The text without line breaks and control characters, shortened."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    return textwrap.shorten(" ".join(words), characters, placeholder=" …")


def bytes_text(size: float) -> str:
    """`65 GiB`, `1.5 GiB`, `64 MiB`, `12 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            break
        size, unit = size / 1024, {"B": "KiB", "KiB": "MiB", "MiB": "GiB", "GiB": "TiB"}[unit]
    return f"{size:.1f} {unit}" if size < 10 and unit != "B" else f"{size:.0f} {unit}"


def si(value: float, unit: str) -> str:
    """`3.4 TB/s`, `15.2 GFLOP/s`, `21.7 ms`: three digits and a decimal prefix, as in data sheets."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{1e6 * value:.3g} µ{unit}"


def seconds_per_call(call: Callable[[], object], device: str, min_s: float = MIN_S) -> float:
    """Mean seconds of a call after one more, over at least `min_s`; on a GPU by its own clock."""
    import torch

    if torch.device(device).type != "cuda":
        call()
        calls, began = 0, time.perf_counter()
        while calls < MAX_CALLS and (calls == 0 or time.perf_counter() - began < min_s):
            call()
            calls += 1
        return (time.perf_counter() - began) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def elapsed_s(calls: int) -> float:
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    call()
    once_s = max(elapsed_s(3) / 3, 1e-7)
    calls = max(3, min(MAX_CALLS, round(min_s / once_s)))
    return elapsed_s(calls) / calls
