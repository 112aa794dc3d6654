"""Text from file names and files, safe to print. Imports no torch."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with control, bidi, undecodable and other unprintable characters as \\-escapes, safe in a terminal."""
    if text.isprintable():
        return text  # the usual case, and this runs for every image read
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
