"""A page of headings, tables and pictures, as Markdown with its pictures beside it or as one HTML file.

Text may hold `code` and **weight**; all else is shown as it stands.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #333; max-width: 60em; margin: 2em auto; padding: 0 1em }
h1, h2, h3 { line-height: 1.25; margin: 1.6em 0 .5em }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums }
th, td { padding: .25em .8em; border-bottom: 1px solid #e4e4e4; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left }
th { border-bottom-color: #999; font-weight: 600 }
code, pre { font: 13px/1.45 ui-monospace, monospace; background: #f5f5f5; border-radius: 3px }
code { padding: .1em .25em } pre { padding: .7em 1em; overflow-x: auto }
figure { margin: 1em 0 } figure svg { max-width: 100%; height: auto } figcaption { color: #777 }
"""


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
    """`name` is that of its file, without ending."""

    name: str
    svg: str
    caption: str


Block = Heading | Text | Bullets | Table | Code | Picture


def pictures(blocks: Sequence[Block]) -> list[Picture]:
    return [block for block in blocks if isinstance(block, Picture)]


def as_markdown(blocks: Sequence[Block], picture_file: Callable[[str], str]) -> str:
    """`picture_file` gives the path of a picture, seen from the page, by its name."""
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
    """One file that needs nothing else: style and pictures are in it."""
    body = "\n".join(_html(block) for block in blocks)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Code(lines):
            return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
        case Picture(name, svg, caption):
            return f"<figure>{_own_names(svg, name)}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Table(columns, rows):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in columns)
            lines = ("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _inline(text: str) -> str:
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)


def _own_names(svg: str, name: str) -> str:
    """Names inside an SVG are those of the whole HTML page: two pictures must not share them."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    return re.sub(r"(url\(#|href=\"#)", rf"\1{name}-", svg)
