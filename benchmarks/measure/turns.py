"""Cases that take turns, of which any may fail: the others are still measured, and every round can be written.

    left_out = {}
    runner = attempt(lambda: Runner(variant, ...), variant.name, left_out)
    interleave({"plain": plain, "ours": ours}, repetitions=5, left_out=left_out, after_round=write)

A case that fails is left out from then on, with its readings so far and one line that says why.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.measure.harness import Reading, write_json
from fastmoco.errors import ConfigError, exit_code

Name = TypeVar("Name", bound=Hashable)
T = TypeVar("T")
MAX_REASON = 300  # characters
_WANTED = re.compile(r"Tried to allocate ([\d.]+ \w+)")


def reason(error: Exception) -> str:
    """One line on why a case failed: the message of an error that a user can act on, else its class and first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, torch.OutOfMemoryError):
        wanted = _WANTED.search(str(error))
        return "too little memory" + (f" for another {wanted[1]}" if wanted else "")
    if exit_code(error) is not None and lines:
        return " ".join(lines)[:MAX_REASON]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:MAX_REASON]


def attempt(call: Callable[[], T], name: str, left_out: dict[str, str]) -> T | None:
    """The result of `call`, or None if it raises any Exception; `left_out[name]` is then the reason.

    Any: on a device that nobody has tried, a kernel, a compiler or a driver may fail with a class of its own.
    """
    try:
        return call()
    except Exception as error:
        left_out[name] = reason(error)
    gc.collect()  # the frames of the traceback held what was built
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after a fault, every call of the device fails
            torch.cuda.empty_cache()
    return None


def interleave(
    cases: Mapping[Name, Callable[[], Reading]],
    repetitions: int,
    *,
    left_out: dict[str, str] | None = None,
    label: Callable[[Name], str] = str,
    after_round: Callable[[dict[Name, list[Reading]], int], None] | None = None,
) -> dict[Name, list[Reading]]:
    """Measure every case once per round, in alternating order, so that noise and drift affect all of them alike.

    cases        functions that warm up, measure once and return the reading
    left_out     receives the reason of each case that fails, under its `label`; without it, an error is raised
    after_round  called with the readings of the cases that are left, as many of each, and the number of rounds

    Raises ConfigError when no case is left.
    """
    readings: dict[Name, list[Reading]] = {name: [] for name in cases}
    for repetition in range(repetitions):
        names = list(readings)
        for name in names if repetition % 2 == 0 else reversed(names):
            if left_out is None:
                readings[name].append(cases[name]())
                continue
            reading = attempt(cases[name], label(name), left_out)
            if reading is None:
                left_out[label(name)] += f" (in round {repetition + 1} of {repetitions})"
                del readings[name]
            else:
                readings[name].append(reading)
        if not readings:
            raise ConfigError(f"nothing could be measured: {describe(left_out or {})}")
        if after_round is not None:
            after_round(readings, repetition + 1)
    return readings


def describe(left_out: Mapping[str, str]) -> str:
    """All reasons in one line."""
    return "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "there is no case"


def save(path: Path | None, result: dict[str, Any], rounds: int, planned_rounds: int, *, complete: bool = True) -> None:
    """Mark a result with its number of rounds, and write it if there is a path.

    It is complete after the last round, if `complete`: more may be measured after these rounds.
    """
    result |= {"complete": complete and rounds >= planned_rounds, "rounds": rounds, "planned_rounds": planned_rounds}
    if path is not None:
        write_json(path, result)
