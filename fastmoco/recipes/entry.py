"""Types of recipes: configuration, data, published accuracy with its source, and accuracy measured with this code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastmoco.config import RunConfig


class Expected(NamedTuple):
    """A published accuracy.

    what     classifier and epochs
    percent  top-1 accuracy
    source   publication
    flags    to add to the recipe
    """

    what: str
    percent: float
    source: str
    flags: str = ""


class Measured(NamedTuple):
    """An accuracy reached with this code.

    what, percent  as in `Expected`
    how            epochs, time, hardware and seeds
    """

    what: str
    percent: float
    how: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run; the docstring of the function that returns it is its description.

    config    settings; unset fields are resolved from the images
    data      data set, and where to get it
    expected  best published accuracies; if there are none, `unknown` says so
    unknown   what the source does not specify, and the choice made here
    evaluate  flags of `fastmoco eval RUN` that measure the expected accuracy; empty if the run's own kNN does
    measured  accuracies reached with this code; empty if not run yet
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
    """Results of a paper by the value of one setting, as text: top-1 percent, or None if training failed."""

    percent: dict[str, float | None]
    what: str
    source: str
