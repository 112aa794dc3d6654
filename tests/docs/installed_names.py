"""Checks what `uv sync` is asked for: python installed_names.py sync --extra NAME --group NAME."""

from __future__ import annotations

import itertools
import sys
import tomllib
from pathlib import Path


def unknown(arguments: list[str]) -> list[str]:
    """The extras and groups among `arguments` that pyproject.toml does not have."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    known = {"--extra": project["project"]["optional-dependencies"], "--group": project["dependency-groups"]}
    pairs = itertools.pairwise(arguments)
    return [name for flag, name in pairs if flag in known and name not in known[flag]]


if __name__ == "__main__":
    missing = unknown(sys.argv[1:])
    sys.exit(f"pyproject.toml has no {', '.join(missing)}" if missing else 0)
