"""The flags of a command as a dataclass defines them, and how an argument list divides into flags and values."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass, replace
from enum import Enum
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from fastmoco.config.checks import alternatives, choices_of, flag

HELP = ("-h", "--help", "--help-all")
REPEATED = "repeated"
"""Annotates a tuple whose flag takes one value and may be repeated: `eval --data a --data b RUN`."""


class Takes(Enum):
    """What may follow a flag."""

    NOTHING = "nothing"
    VALUE = "a value"
    NUMBERS = "a number or several"
    WORDS = "a value or several"


class Numbers(NamedTuple):
    """What a flag of numbers takes: `int` or `float`, and how many (None: any number of them)."""

    kind: type
    length: int | None = 1

    def expected(self) -> str:
        name = "whole number" if self.kind is int else "number"
        return f"a {name}" if self.length == 1 else f"{name}s" if self.length is None else f"{self.length} {name}s"


@dataclass(frozen=True)
class Flags:
    """The flags of a command.

    takes       what follows each flag, `--no-x` and short names among them
    numbers     the flags whose values are numbers
    positional  names of the values that have no flag, such as DATA
    repeated    flags that may be repeated, with a value each time
    """

    takes: dict[str, Takes] = field(default_factory=dict)
    numbers: dict[str, Numbers] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    repeated: frozenset[str] = frozenset()

    def and_value(self, name: str) -> Flags:
        """These flags and another one, which takes a value."""
        return replace(self, takes=self.takes | {name: Takes.VALUE})


class Argument:
    """A flag with its values, or a single value without a flag (then `flag` is empty)."""

    def __init__(self, flag: str, *values: str) -> None:
        self.flag, self.values = flag, list(values)

    def __repr__(self) -> str:
        return " ".join([self.flag, *self.values]).strip()


@cache
def flags_of(kind: type) -> Flags:
    """The flags that the command line has for a dataclass; fields that are dataclasses are included without prefix."""
    import tyro  # takes a quarter of a second

    takes, positional, repeated = dict.fromkeys(HELP, Takes.NOTHING), (), frozenset[str]()
    numbers: dict[str, Numbers] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        notes: list[Any] = []
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
        if is_dataclass(hint):
            nested = flags_of(hint)
            takes |= nested.takes
            numbers |= nested.numbers
            positional += nested.positional
            repeated |= nested.repeated
        elif tyro.conf.Positional in notes:
            positional += (name,)
        else:
            aliases = [alias for note in notes for alias in getattr(note, "aliases", None) or ()]
            takes |= dict.fromkeys([flag(name), *aliases], Takes.VALUE if REPEATED in notes else _takes(hint))
            repeated |= {flag(name)} if REPEATED in notes else set()
            if REPEATED not in notes and (of_numbers := _numbers(hint)) is not None:
                numbers |= dict.fromkeys([flag(name), *aliases], of_numbers)
            if hint is bool and tyro.conf.FlagCreatePairsOff not in notes:
                takes[flag("no_" + name)] = Takes.NOTHING
    return Flags(takes, numbers, positional, repeated)


def _numbers(hint: Any) -> Numbers | None:
    """What a field takes if it takes nothing but numbers."""
    if choices_of(hint):
        return None
    for option in alternatives(hint):
        if option in (int, float):
            return Numbers(option)
        if get_origin(option) is tuple and (items := get_args(option))[0] in (int, float):
            return Numbers(items[0], None if Ellipsis in items else len(items))
    return None


def _takes(hint: Any) -> Takes:
    if hint is bool:
        return Takes.NOTHING
    for option in alternatives(hint):
        if get_origin(option) is tuple:
            return Takes.NUMBERS if get_args(option)[0] in (int, float) else Takes.WORDS
    return Takes.VALUE


def take_values(takes: Takes, rest: list[str]) -> list[str]:
    """Remove the values of a flag from the front of `rest`, and return them."""
    limit = {Takes.NOTHING: 0, Takes.VALUE: 1}.get(takes, len(rest))
    values: list[str] = []
    while rest and len(values) < limit and not is_flag(rest[0]):
        if takes == Takes.NUMBERS and values and not is_number(rest[0]):
            break
        values.append(rest.pop(0))
    return values


def is_flag(text: str) -> bool:
    """Whether an argument is a flag: it begins with a hyphen and is no negative number."""
    return text.startswith("-") and text != "-" and not is_number(text)


def is_number(text: str) -> bool:
    """Whether a text is a number as Python writes it."""
    try:
        float(text)
    except ValueError:
        return False
    return True
