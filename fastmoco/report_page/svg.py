"""Plots as SVG inside an HTML page: deterministic, described for screen readers, in colours of the page's style."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from pipelines.data.printable import printable

_RC: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fastmoco", "font.family": "sans-serif", "font.size": 9}
_NAMES = ("ink", "muted", "grid", "line-1", "line-2", "line-3", "line-4", "line-5", "line-6", "line-7", "line-8")
_STAND_INS = {f"#0000{number + 1:02x}": name for number, name in enumerate(_NAMES)}  # colours that matplotlib accepts
_OF_NAME = {name: colour for colour, name in _STAND_INS.items()}


def colour(name: str) -> str:
    """The colour to draw with for a custom property of the page's style, such as `ink` or `line-1`."""
    return _OF_NAME[name]


def svg_text(figure: Figure, description: str) -> str:
    """SVG on one line, with a description. Text stays text. Colours of `colour` become those of the page."""
    out = io.StringIO()
    with mpl.rc_context(_RC):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Description": description})
    svg = out.getvalue()
    svg = re.sub(r"\s*\n\s*", " ", svg[svg.index("<svg") :]).replace("> <", "><").strip() + "\n"
    return re.sub(r"#0000[0-9a-f]{2}\b", lambda found: _page_colour(found[0]), svg)


def _page_colour(stand_in: str) -> str:
    name = _STAND_INS.get(stand_in)
    return stand_in if name is None else f"var(--{name})"


def embedded(svg: str, name: str, label: str) -> Markup:
    """The SVG for an HTML page, as an image with a label for screen readers.

    Ids are global in a page, and two pictures may use the same: each is prefixed by `name`.
    """
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\1{name}-", svg)
    return Markup(svg.replace("<svg ", Markup('<svg role="img" aria-label="{}" ').format(printable(label)), 1))
