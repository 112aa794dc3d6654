"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(word: str, known: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The entry of `known` most similar to `word`; None if no similarity (difflib's ratio, 0 to 1) reaches `cutoff`."""
    return next(iter(get_close_matches(word[:80], list(known), n=1, cutoff=cutoff)), None)
