"""Which parts of a suite fit into a number of seconds, and how many are spent, over all commands with one folder.

The time of a part is at most its limit, so parts are chosen by limits: what a part leaves of its own is used for
others when it has ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure.harness import write_json
from benchmarks.measure.suites import Part

SPENT = "spent.json"
LEAST_SHARE = 0.6  # of its limit with which a part still starts: it keeps its readings of whole rounds when stopped


@dataclass
class Budget:
    """Seconds that a suite may take.

    total_s  over all commands with the folder of `file`; infinite by default
    call_s   of this command, which leaves what does not fit to the next one
    """

    file: Path | None = None
    total_s: float = float("inf")
    call_s: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    earlier_s: float = field(init=False, default=0.0)
    began_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.began_s = self.clock()
        if self.file is not None:
            with suppress(OSError, ValueError, KeyError, TypeError):
                self.earlier_s = float(json.loads(self.file.read_text(encoding="utf-8"))["seconds"])

    @property
    def spent_s(self) -> float:
        """By this command and the earlier ones."""
        return self.earlier_s + self.clock() - self.began_s

    def note(self) -> None:
        """Write what is spent, for later commands."""
        if self.file is not None:
            write_json(self.file, {"seconds": round(self.spent_s, 1)})

    def refusal(self, part: Part, reserved_s: float) -> str:
        """Why a part is not started now, or an empty string. `reserved_s` are kept for the parts at the end."""
        left_s = self.total_s - self.spent_s - reserved_s
        if part.limit_s * LEAST_SHARE > left_s:
            return f"it may take {part.limit_s:.0f} s, and {max(0.0, left_s):.0f} s of the budget are left"
        call_left_s = self.call_s - (self.clock() - self.began_s) - reserved_s
        if min(part.limit_s, left_s) > call_left_s:
            return (
                f"it may take {part.limit_s:.0f} s, and {max(0.0, call_left_s):.0f} s are left of this command's "
                f"{self.call_s:.0f}: run it again"
            )
        return ""

    def limit_s(self, part: Part, reserved_s: float) -> float:
        """Limit of a part that is not refused: its own, or what is left if that is less."""
        return min(part.limit_s, self.total_s - self.spent_s - reserved_s)


@dataclass(frozen=True)
class Plan:
    """Parts in the order in which they run, with their limits in seconds, and why the others are left out."""

    limits_s: dict[str, float]
    left_out: dict[str, str]

    @property
    def total_s(self) -> float:
        return sum(self.limits_s.values())


def in_order(parts: Sequence[Part], stopped: Iterable[str] = ()) -> list[Part]:
    """By priority; parts that were stopped before come after all others, and those that run every time at the end."""
    names = set(stopped)
    return sorted(parts, key=lambda part: (part.again, part.name in names, part.priority))


def reserved_s(parts: Iterable[Part]) -> float:
    """Limits of the parts that run every time."""
    return sum(part.limit_s for part in parts if part.again)


def plan(parts: Sequence[Part], budget: Budget) -> Plan:
    """What fits if every part takes as long as its limit allows; `parts` in their order."""
    now, chosen, left_out = budget.clock(), dict[str, float](), dict[str, str]()
    used_s = 0.0
    ahead = Budget(None, budget.total_s, budget.call_s, lambda: now + used_s)
    ahead.earlier_s, ahead.began_s = budget.earlier_s, budget.began_s
    for part in parts:
        kept_s = 0.0 if part.again else reserved_s(parts)
        if why := "" if part.again else ahead.refusal(part, kept_s):
            left_out[part.name] = why
            continue
        chosen[part.name] = part.limit_s if part.again else ahead.limit_s(part, kept_s)
        used_s += chosen[part.name]
    return Plan(chosen, left_out)
