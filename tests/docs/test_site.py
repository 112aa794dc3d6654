"""The documentation builds as a site: every link and anchor is found, and nothing comes from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from tools.site_pages import site_links

REPOSITORY = "https://example.org/owner/name"


@pytest.fixture(scope="module")
def site(require_backend: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with the address of a repository."""
    require_backend("site")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "REPOSITORY_URL": REPOSITORY, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole(site: Path) -> None:
    for page in ("index.html", "faq/index.html", "tutorials/first-run/index.html", "contributing/index.html"):
        assert "</html>" in (site / page).read_text(encoding="utf-8"), page
    assert (site / "tutorials" / "first_run.ipynb").is_file()
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="tutorials/first-run/"' in home
    assert 'src="views.png"' in home
    assert f"{REPOSITORY}/blob/HEAD/CITATION.cff" in home


@pytest.mark.slow
def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    """Scripts, styles, fonts and pictures are of the site itself; links may lead elsewhere."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\s\">]+)", text)
        loaded += [
            link for tag, link in re.findall(r"<link\b([^>]*)\bhref=\"?([^\s\">]+)", text) if "canonical" not in tag
        ]
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import", style.read_text(encoding="utf-8")), style


def test_links_of_the_repository_become_those_of_the_site() -> None:
    text = "[a](docs/data.md#x) ![p](docs/views.png) [b](CONTRIBUTING.md) [c](CITATION.cff) [d](https://x.org) [e](#y)"
    assert site_links(text, "README.md", "index.md", REPOSITORY) == (
        "[a](data.md#x) ![p](views.png) [b](contributing.md) "
        f"[c]({REPOSITORY}/blob/HEAD/CITATION.cff) [d](https://x.org) [e](#y)"
    )
    assert site_links("[a](../../README.md) [b](../data.md)", "docs/tutorials/x.md", "tutorials/x.md", "") == (
        "[a](../index.md) [b](../data.md)"
    )


def test_without_an_address_a_link_to_a_source_file_is_text() -> None:
    assert site_links("see [the test](../tests/conftest.py)", "docs/a.md", "a.md", "") == "see the test"


def test_a_link_to_a_file_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"docs/a.md links to ../gone.py, which is not in the repository"):
        site_links("[x](../gone.py)", "docs/a.md", "a.md", REPOSITORY)


def test_code_is_left_as_it_is() -> None:
    text = "```python\nx = [a](docs/data.md)\n```\n"
    assert site_links(text, "README.md", "index.md", "") == text
