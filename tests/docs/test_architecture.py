"""The map of the code and its layers are those of the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
MAP, RULES = PAGE.split("## Rules between layers")
RULES = RULES.split("## Adding to it")[0]
PACKAGES = ("fastmoco", "pipelines", "benchmarks", "tools", "tests")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]


def layers_of(package: str) -> list[set[str]]:
    """The layers that import-linter checks, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [contract for contract in contracts if contract.get("containers") == [package]]
    return [set(layer.replace("__main__ | ", "").split(" | ")) for layer in contract["layers"]]


def shown_layers() -> list[list[set[str]]]:
    """Those of the page, for each package."""
    lines = re.findall(r"^    .*$", RULES, re.MULTILINE)
    joined = re.sub(r"\n\s+→", " →", "\n".join(lines))
    return [[set(layer.strip().split(" | ")) for layer in line.split("→")] for line in joined.splitlines()]


def test_the_layers_of_fastmoco_are_those_that_are_enforced() -> None:
    assert shown_layers()[0] == layers_of("fastmoco")


def test_the_layers_of_pipelines_are_those_that_are_enforced() -> None:
    """One of them is long, and stands with its first names."""
    for shown, enforced in zip(shown_layers()[1], layers_of("pipelines"), strict=True):
        names = {name for group in shown for name in group.split(", ")}
        assert names == enforced or ("…" in names and names - {"…"} < enforced)


def test_every_file_of_the_map_exists() -> None:
    names = {name for name in re.findall(r"`([\w/]+\.(?:py|c|md|yml))`", MAP) if not (ROOT / name).exists()}
    assert {name for name in names if not any(path.as_posix().endswith(f"/{name}") for path in SOURCES)} == set()


@pytest.mark.parametrize("package", ["fastmoco", "pipelines"])
def test_every_module_and_folder_of_a_package_is_on_the_map(package: str) -> None:
    found = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__", "__main__"}
    found |= {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert {name for name in found if not re.search(rf"\b{name}\b", MAP)} == set()
