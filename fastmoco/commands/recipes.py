"""`fastmoco recipes`: a table of the recipes, or one of them in detail."""

from __future__ import annotations

import textwrap
from typing import Any

from fastmoco.config import RunConfig, differences
from fastmoco.config.checks import flag
from fastmoco.config.flags import HELP
from fastmoco.errors import ConfigError
from fastmoco.output import Form, output_form, write_event
from fastmoco.recipes import RECIPES, Recipe, entry

USAGE = """usage: fastmoco recipes [NAME]

The recipes with expected and measured accuracies; or one of them in detail,
with sources."""
WIDTH = 110
NOT_RUN = "not run yet"


def recipes_command(argv: list[str]) -> None:
    """Print all recipes, or the named one. Raises ConfigError for an unknown name."""
    if {*HELP} & {*argv}:
        print(USAGE)
        return
    flags = [word for word in argv if word.startswith("-")]
    if flags:
        raise ConfigError(f"unknown argument {flags[0]!r}: fastmoco recipes takes a name or nothing")
    if len(argv) > 1:
        raise ConfigError(f"fastmoco recipes takes at most one name, got {' '.join(argv)!r}")
    if output_form() == Form.JSON:
        write_event("result", {"recipes": [values(name) for name in argv or RECIPES]})
    else:
        print(in_full(argv[0]) if argv else table())


def values(name: str) -> dict[str, Any]:
    """What --json prints of a recipe."""
    recipe = entry(name)
    return {
        "name": name,
        "description": RECIPES[name].__doc__,
        "data": recipe.data,
        "settings": {field: value for field, value, _ in differences(recipe.config, RunConfig())},
        "evaluate": recipe.evaluate,
        "vary": recipe.vary,
        "expected": [accuracy._asdict() for accuracy in recipe.expected],
        "measured": [accuracy._asdict() for accuracy in recipe.measured],
    }


def table() -> str:
    """One line per recipe: name, first expected and measured accuracy, description."""
    rows = [("recipe", "expected", "measured here", "")]
    for name, function in RECIPES.items():
        recipe = function()
        expected = f"{recipe.expected[0].percent:.1f} %" if recipe.expected else "a sweep" if recipe.vary else "unknown"
        measured = f"{recipe.measured[0].percent:.1f} %" if recipe.measured else NOT_RUN
        rows.append((name, expected, measured, function.__doc__ or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), "", "In detail, with sources: fastmoco recipes NAME"])


def in_full(name: str) -> str:
    """Commands, data, settings, expected results with sources, and measured results of a recipe."""
    recipe = entry(name)
    command = f"fastmoco sweep {name}, equivalent to --vary {recipe.vary}" if recipe.vary else f"fastmoco train {name}"
    sections = [(name, [RECIPES[name].__doc__ or ""]), ("run", [command])]
    if recipe.evaluate:
        sections.append(("evaluate", [f"fastmoco eval RUN {recipe.evaluate}"]))
    sections += [
        ("data", [recipe.data]),
        ("settings", [" ".join(_flags(recipe.config))]),
        ("expected", _expected(recipe)),
        ("measured", [f"{m.what}: {m.percent:.1f} % ({m.how})" for m in recipe.measured] or [NOT_RUN]),
    ]
    indent = 2 + max(len(title) for title, _ in sections)
    wrapper = textwrap.TextWrapper(
        WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    lines = []
    for title, texts in sections:
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
    """Command line flags that give this configuration."""
    flags = []
    for name, value, _ in differences(config, RunConfig()):
        if isinstance(value, bool):
            flags.append(flag(name) if value else flag("no_" + name))
        else:
            items = value if isinstance(value, tuple) else (value,)
            flags.append(" ".join([flag(name), *map(str, items)]))
    return flags
