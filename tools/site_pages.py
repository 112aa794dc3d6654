"""Hooks of mkdocs (mkdocs.yml): files outside of docs/ as pages of the site, and links that work there.

README.md becomes the first page; CONTRIBUTING, CHANGELOG and SECURITY are pages, too. In the repository all links are
between files. On the site, those to other files lead to the repository, or are plain text if its address is unknown.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of PAGES."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Adapt the links of a page."""
    source = next((source for source, name in PAGES.items() if name == page.file.src_uri), None)
    return site_links(markdown, source or f"docs/{page.file.src_uri}", page.file.src_uri, config.repo_url or "")


def site_links(markdown: str, source: str, page: str, repository: str) -> str:
    """`markdown` of the file `source` with its links as they are on the site.

    source      path of the file in the repository
    page        path of the page below docs/
    repository  address of the repository, or empty
    """

    def replaced(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if file in PAGES or file.startswith("docs/"):
            below = PAGES.get(file, file.removeprefix("docs/"))
            return f"{picture}[{text}]({posixpath.relpath(below, posixpath.dirname(page) or '.')}{hash_}{anchor})"
        if not (ROOT / file).exists():
            raise ValueError(f"{source} links to {target}, which is not in the repository")
        return f"[{text}]({repository}/blob/HEAD/{file}{hash_}{anchor})" if repository else text

    parts = _FENCED.split(markdown)
    return "".join(part if part.lstrip().startswith("```") else _LINK.sub(replaced, part) for part in parts)
