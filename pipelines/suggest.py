"""What a misspelt name was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(word: str, known: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The most similar of `known`; None where none reaches the similarity `cutoff`, from 0 to 1 (difflib's ratio)."""
    return next(iter(get_close_matches(word[:80], list(known), n=1, cutoff=cutoff)), None)
