"""`fastmoco recipes`: the named runs as a table, and one of them in full."""

from __future__ import annotations

import textwrap

from fastmoco.config import RunConfig, differences
from fastmoco.config.checks import flag
from fastmoco.errors import ConfigError
from fastmoco.recipes import RECIPES, Recipe, entry

USAGE = """usage: fastmoco recipes [NAME]

The named runs, and what to expect of each; or one of them in full, with sources."""
WIDTH = 110
NOT_RUN = "not run yet"


def recipes_command(argv: list[str]) -> None:
    """All recipes, or the one that is named. Raises ConfigError for a name that is none."""
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        return
    if len(argv) > 1:
        raise ConfigError(f"fastmoco recipes takes one name at most; found {' '.join(argv)!r}")
    print(in_full(argv[0]) if argv else table())


def table() -> str:
    """A line for each: name, the first figure that is expected and measured, and what it is."""
    rows = [("recipe", "expected", "measured here", "")]
    for name, function in RECIPES.items():
        recipe = function()
        expected = f"{recipe.expected[0].percent:.1f} %" if recipe.expected else "a sweep" if recipe.vary else "unknown"
        measured = f"{recipe.measured[0].percent:.1f} %" if recipe.measured else NOT_RUN
        rows.append((name, expected, measured, function.__doc__ or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), "", "In full, with sources: fastmoco recipes NAME"])


def in_full(name: str) -> str:
    """How to run it, on what, its settings, what to expect with sources, and what was measured."""
    recipe = entry(name)
    command = f"fastmoco sweep {name}, the same as --vary {recipe.vary}" if recipe.vary else f"fastmoco train {name}"
    parts = [(name, [RECIPES[name].__doc__ or ""]), ("run", [command])]
    if recipe.evaluate:
        parts.append(("evaluate", [f"fastmoco eval RUN {recipe.evaluate}"]))
    parts += [
        ("data", [recipe.data]),
        ("settings", [" ".join(_flags(recipe.config))]),
        ("expected", _expected(recipe)),
        ("measured", [f"{m.what}: {m.percent:.1f} % ({m.how})" for m in recipe.measured] or [NOT_RUN]),
    ]
    indent = 2 + max(len(title) for title, _ in parts)
    wrapper = textwrap.TextWrapper(
        WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    lines = []
    for title, texts in parts:
        for number, text in enumerate(texts):
            wrapper.initial_indent = (title if number == 0 else "").ljust(indent)
            lines += wrapper.wrap(text)
    return "\n".join(lines)


def _expected(recipe: Recipe) -> list[str]:
    lines = []
    for what, percent, source, flags in recipe.expected:
        lines.append(f"{what}: {percent:.1f} % ({source})" + (f", with {flags}" if flags else ""))
    return lines + ([recipe.unknown] if recipe.unknown else [])


def _flags(config: RunConfig) -> list[str]:
    """What has to be said on the command line to get this configuration."""
    words = []
    for name, value, _ in differences(config, RunConfig()):
        if isinstance(value, bool):
            words.append(flag(name) if value else flag("no_" + name))
        else:
            items = value if isinstance(value, tuple) else (value,)
            words.append(" ".join([flag(name), *map(str, items)]))
    return words
