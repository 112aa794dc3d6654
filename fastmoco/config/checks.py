"""Checks of configuration fields: annotated types, ranges, unknown names. All raise ConfigError.

A message has the flag, its value and what was expected; for an unknown name it suggests the closest one.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastmoco.errors import ConfigError
from pipelines.suggest import closest


@cache
def group_types(cls: type) -> dict[str, Any]:
    """Types of the fields of a dataclass by name, with the annotations evaluated."""
    return get_type_hints(cls)


def check_types(config: Any) -> None:
    """Reject values that do not have the annotated type; convert int to float in float fields."""
    for name, hint in group_types(type(config)).items():
        value = getattr(config, name)
        if not _matches(value, hint):
            match = closest(value, choices_of(hint), cutoff=0.5) if isinstance(value, str) else None
            advice = f"; did you mean {match}?" if match else ""
            raise ConfigError(f"{flag(name)} is {shorten(value)}, expected {_describe(hint)}{advice}")
        if isinstance(value, int) and float in alternatives(hint):
            object.__setattr__(config, name, float(value))
        if isinstance(value, tuple) and tuple[float, ...] in alternatives(hint):
            object.__setattr__(config, name, tuple(float(item) for item in value))


def require(config: Any, name: str, valid: Callable[[Any], bool], expected: str, advice: str = "") -> None:
    """Reject a value that is neither None nor valid."""
    value = getattr(config, name)
    if value is not None and not valid(value):
        raise ConfigError(f"{flag(name)} is {shorten(value)}, expected {expected}" + (f": {advice}" if advice else ""))


def known(name: str, names: Iterable[str], kind: str) -> None:
    """Reject a name that is not one of `names`."""
    if name not in names:
        match = closest(name, names)
        raise ConfigError(
            f"the configuration has no {kind} {shorten(name)}" + (f"; did you mean {match!r}?" * bool(match))
        )


def flag(name: str) -> str:
    """`moco_k` → `--moco-k`."""
    return "--" + name.replace("_", "-")


def parse_json(text: str) -> Any:
    """Parse strict JSON: repeated keys, NaN and infinities are rejected."""
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the configuration is not valid JSON ({error}): expected a file written by fastmoco"
        ) from None


def as_object(value: Any, name: str) -> dict[str, Any]:
    """Reject JSON that is not an object."""
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {shorten(value)}, expected a JSON object of fields")
    return value


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def choices_of(hint: Any) -> list[str]:
    """The values of a `Literal`, alone or in a union, in its order; none for other types."""
    return [choice for t in alternatives(hint) if get_origin(t) is Literal for choice in get_args(t)]


def _matches(value: Any, hint: Any) -> bool:
    return any(_matches_one(value, t) for t in alternatives(hint))


def _matches_one(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and any(_is_choice(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_matches(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool):  # a subclass of int
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, hint)


def _is_choice(value: str, choice: str) -> bool:
    """Whether it is a choice; `timm/NAME` is any name after that prefix."""
    prefix = choice.removesuffix("NAME")
    return value == choice if prefix == choice else value.startswith(prefix) and value not in (prefix, choice)


def _describe(hint: Any) -> str:
    if choices := choices_of(hint):
        return "one of " + ", ".join(choices)
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    names |= {tuple[int, ...]: "a list of whole numbers", tuple[float, ...]: "a list of finite numbers"}
    names[tuple[str, ...]] = "a list of names"
    return " or ".join(names.get(t, "an object") for t in alternatives(hint) if t is not types.NoneType)


def shorten(value: Any) -> str:
    """A value of any kind for a message: at most 80 characters, without control characters."""
    try:
        text = ascii(value)  # names from a file may contain control and bidirectional characters
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, 1,000 nested lists
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ConfigError("the configuration names a field twice: keep one of the two")
    return tree


def _refuse_constant(text: str) -> Any:
    raise ConfigError(f"the configuration contains {text}, expected finite numbers")
