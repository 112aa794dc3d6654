"""Advice on installing: extras of a checkout, with a command that removes nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from pipelines.errors import how_to_install

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("fastmoco", "pipelines", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")
]


def test_no_advice_to_install_a_package_that_is_not_published() -> None:
    assert [path for path in SOURCES if "fastmoco[" in path.read_text(encoding="utf-8")] == []


def test_every_extra_is_added_without_removing_others() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"uv sync (?!--inexact)", text), path
        for name in re.findall(r"""how_to_install\(["'](\S+)["']\)""", text):
            assert name in extras, path
    assert how_to_install("dali") == "uv sync --inexact --extra dali"
