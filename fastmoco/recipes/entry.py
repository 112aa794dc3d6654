"""What a recipe says of itself: how to run it, on what, what to expect and where that is from, what came of it here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastmoco.config import RunConfig


class Expected(NamedTuple):
    """A published accuracy.

    what     of which classifier, after how long
    percent  top-1 accuracy
    source   where it is published
    flags    what to add to the recipe for it
    """

    what: str
    percent: float
    source: str
    flags: str = ""


class Measured(NamedTuple):
    """An accuracy reached with this code: as `Expected`, and on what, in how long, with which seeds."""

    what: str
    percent: float
    how: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run. Its function's docstring is what it is, in one line.

    config    the settings; open ones are filled in from the images
    data      what it trains on, and where to get that
    expected  best known figures; empty where none is known, and then `unknown` says so
    unknown   what the source leaves open, and what stands here in its place
    evaluate  flags of `fastmoco eval RUN` that measure what is expected; empty where the kNN of the run itself does
    measured  what this code has reached; empty if it was not run yet
    vary      for an ablation, what `fastmoco sweep` varies: `field=value,value`
    """

    config: RunConfig
    data: str
    expected: tuple[Expected, ...] = ()
    unknown: str = ""
    evaluate: str = ""
    measured: tuple[Measured, ...] = ()
    vary: str = ""


@dataclass(frozen=True)
class Published:
    """What a paper found for the values of one setting: top-1 percent, or None where training failed."""

    percent: dict[str, float | None]
    what: str
    source: str
