"""Settings of a call in Python as the arguments of a command, so that both are checked and explained alike."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from fastmoco.config.checks import flag
from fastmoco.errors import ConfigError


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """`{"batch_size": 256, "cos": True, "data": ["a", "b"]}` → `--batch-size 256 --cos --data a b`.

    False is the negated flag, None the word None, which is the default of fields that have it. Raises ConfigError for
    a value of any other kind than text, numbers, paths and lists of them.
    """
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
            continue
        values = list(value) if isinstance(value, Iterable) and not isinstance(value, str | os.PathLike) else [value]
        texts = [_text(name, one) for one in values]
        words += [f"{flag(name)}={texts[0]}"] if len(texts) == 1 else [flag(name), *texts]
    return words


def _text(name: str, value: Any) -> str:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | int | float):
        return str(value)
    raise ConfigError(f"{name} is a {type(value).__name__}, expected text, a number, a path, or a list of them")
