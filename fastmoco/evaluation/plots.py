"""Helpers that the plots of an evaluation share."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.figure import Figure

from fastmoco.run.png import save_figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG. Characters that the font lacks become boxes, without a warning for each. Raises OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        save_figure(figure, path)


def display_name(name: str, max_length: int = 22) -> str:
    """A name that matplotlib prints literally: no formulas between dollar signs, at most `max_length` characters."""
    text = replace_unprintable(name)
    text = text if len(text) <= max_length else text[: max_length - 1] + "…"
    return text.replace("$", r"\$")


def shortened(text: str, length: int) -> str:
    """A text without its middle, where names of files differ least: `n02101…er.JPEG`."""
    if len(text) <= length:
        return text
    end = length // 2
    return text[: max(0, length - end - 1)] + "…" + text[len(text) - end :] if length else ""


def replace_unprintable(text: str) -> str:
    """Replace every character that is not printable by a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
