"""A page of headings, tables and pictures, written as Markdown, as one HTML file, or to a terminal.

Text may contain `code` and **bold**; everything else is literal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from fastmoco.report_page.render import render
from fastmoco.report_page.svg import embedded


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Code:
    lines: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """`name` is the file name without its suffix."""

    name: str
    svg: str
    caption: str


Block = Heading | Text | Bullets | Table | Code | Picture


def pictures(blocks: Sequence[Block]) -> list[Picture]:
    return [block for block in blocks if isinstance(block, Picture)]


def as_markdown(blocks: Sequence[Block], picture_file: Callable[[str], str]) -> str:
    """`picture_file` returns the path of a picture, relative to the page, from its name."""
    return "\n\n".join(_markdown(block, picture_file) for block in blocks) + "\n"


def _markdown(block: Block, picture_file: Callable[[str], str]) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Code(lines):
            return "\n".join(f"    {line}" for line in lines)
        case Picture(name, _, caption):
            return f"![{caption}]({picture_file(name)})"
        case Table(columns, rows):
            lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """A self-contained HTML file: style and pictures are embedded."""
    drawn = {picture.name: embedded(picture.svg, picture.name, picture.caption) for picture in pictures(blocks)}
    kinds = [(type(block).__name__, block) for block in blocks]
    return render("page.html.j2", Path(__file__).parent, title=title, blocks=kinds, drawn=drawn)


def make_console() -> Console:
    """Standard output, wide enough for the tables where it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def print_blocks(console: Console, blocks: Sequence[Block]) -> None:
    """Print headings, text and tables; pictures are left out."""
    for block in blocks:
        match block:
            case Heading(title):
                console.print(RichText(title, "bold"), soft_wrap=True)
            case Text(line):
                console.print(RichText(line, "dim"), soft_wrap=True)
            case Table(columns, rows):
                console.print(_rich_table(columns, rows))


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    """Names left-aligned, numbers right-aligned."""
    table = RichTable()
    for i, column in enumerate(columns):
        table.add_column(RichText(column), justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*(RichText(cell) for cell in row))
    return table
