"""A series of numbers as one line of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"


def sparkline(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """At most `width` characters, each the mean of its share of the values, from the lowest to the highest of them."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [number * len(values) // count for number in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    levels = _ASCII if ascii_only else _BLOCKS
    if high == low:
        return levels[0] * count
    return "".join(levels[min(len(levels) - 1, int((m - low) / (high - low) * len(levels)))] for m in means)
