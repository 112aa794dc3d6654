"""A page as a browser would take it: elements, visible text, and the rules that every page keeps."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from fastmoco.report_page.page import make_page
from fastmoco.report_page.run_files import read_run

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Elements with their attributes, visible text, and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.open = [], []
        self.feed(html)
        self.close()
        assert self.open == [], "not closed"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*folders: Path) -> Page:
    return checked(make_page([read_run(folder) for folder in folders]))


def checked(html: str) -> Page:
    """The page, which loads nothing, has unique ids, and describes every picture, all of which decode."""
    page = Page(html)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert re.match(r"data:image/|#", attributes.get(name) or "#"), (tag, name)
    assert re.findall(r"url\(\s*[\"']?(?!#)|@import|fetch\(|XMLHttp", html) == []
    assert len(page.all("script")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    for image in page.all("img"):
        assert image["alt"]
        data = base64.b64decode((image["src"] or "").partition("base64,")[2])
        with Image.open(io.BytesIO(data)) as decoded:
            decoded.load()
            assert decoded.size == (int(image["width"] or 0), int(image["height"] or 0))
    html.encode("utf-8")
    return page
