"""Templates → HTML: escaped, with undecodable and invisible characters of names shown as escapes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pipelines.data.printable import printable

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """A template in `folder`, or among those that all pages share, filled in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"inline": inline, "glued": glued}
    return environment.get_template(template).render(values)


def inline(text: str) -> Markup:
    """Text in which `code` and **bold** are marked up, and everything else is literal."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(text))))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked))


def glued(text: str) -> Markup:
    """Text in which no line ends between a number and its unit."""
    return Markup(re.sub(r"(?<=\d) (?=\S)", "\u00a0", str(escape(printable(text)))))


def _shown(value: Any) -> Any:
    return printable(value) if type(value) is str else value
