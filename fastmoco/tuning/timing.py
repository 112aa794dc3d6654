"""Times of training steps, interleaved, so that a slow moment of the machine affects all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 5
READING_S = 0.3  # shortest reading; a step that takes longer is a reading by itself
WARM_UP = 2  # steps before the first reading: selection of algorithms, allocation of workspaces


def step_seconds(steps: Sequence[Callable[[], object]], device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """Median seconds per call of each function, over `rounds` readings in turns.

    A reading has as many calls as fit READING_S, and waits for the device at its ends.
    """
    counts = []
    for step in steps:
        for _ in range(WARM_UP):
            step()
        counts.append(max(1, round(READING_S / _seconds(step, 1, device))))
    readings: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, count, taken in zip(steps, counts, readings, strict=True):
            taken.append(_seconds(step, count, device))
    return [statistics.median(taken) for taken in readings]


def _seconds(step: Callable[[], object], count: int, device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    _synchronise(device)
    return (time.perf_counter() - began) / count


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Return the memory of steps that are no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
