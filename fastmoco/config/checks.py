"""Checks on the fields of a configuration: types from the annotations, ranges, unknown names. All raise ConfigError.

A message names the flag, the value found and the values expected; a word that is not known comes with the nearest one.
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
    """Field name → type of a dataclass, with the annotations evaluated."""
    return get_type_hints(cls)


def check_types(config: Any) -> None:
    """Refuse values of another type than annotated; a whole number becomes a float where a float is due."""
    for name, hint in group_types(type(config)).items():
        value = getattr(config, name)
        if not _matches(value, hint):
            near = closest(value, _choices(hint)) if isinstance(value, str) else None
            advice = f"; did you mean {near}?" if near else ""
            raise ConfigError(f"{flag(name)} is {_shorten(value)}, expected {_describe(hint)}{advice}")
        if isinstance(value, int) and float in _alternatives(hint):
            object.__setattr__(config, name, float(value))


def require(config: Any, name: str, valid: Callable[[Any], bool], expected: str, advice: str = "") -> None:
    """Refuse a value, unless it is None, that is not valid."""
    value = getattr(config, name)
    if value is not None and not valid(value):
        raise ConfigError(f"{flag(name)} is {_shorten(value)}, expected {expected}" + (f": {advice}" if advice else ""))


def known(name: str, names: Iterable[str], what: str) -> None:
    """Refuse a name that is not one of `names`."""
    if name not in names:
        near = closest(name, names)
        raise ConfigError(
            f"the configuration has no {what} {_shorten(name)}" + (f"; did you mean {near!r}?" * bool(near))
        )


def flag(name: str) -> str:
    """`moco_k` → `--moco-k`."""
    return "--" + name.replace("_", "-")


def parse_json(text: str) -> Any:
    """Strict JSON: a key that is repeated, NaN and infinities are refused."""
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the configuration is not valid JSON ({error}): expected a file as fastmoco writes it"
        ) from None


def as_object(value: Any, what: str) -> dict[str, Any]:
    """Refuse JSON that is not an object."""
    if not isinstance(value, dict):
        raise ConfigError(f"{what} is {_shorten(value)}, expected a JSON object of fields")
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(hint: Any) -> list[str]:
    return [word for one in _alternatives(hint) if get_origin(one) is Literal for word in get_args(one)]


def _matches(value: Any, hint: Any) -> bool:
    return any(_matches_one(value, one) for one in _alternatives(hint))


def _matches_one(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_matches(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool):  # True is an int to Python, and to nobody else
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if choices := _choices(hint):
        return "one of " + ", ".join(choices)
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return " or ".join(
        words.get(one, "a list of whole numbers" if get_origin(one) is tuple else "an object")
        for one in _alternatives(hint)
        if one is not types.NoneType
    )


def _shorten(value: Any) -> str:
    try:
        text = ascii(value)  # names from a file may hold control and bidirectional characters
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, a nest of 1,000 lists
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ConfigError("the configuration names a field twice: keep one of the two")
    return tree


def _refuse_constant(text: str) -> Any:
    raise ConfigError(f"the configuration contains {text}, expected finite numbers")
