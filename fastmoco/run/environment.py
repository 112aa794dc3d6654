"""Software that a run depends on: its own version, those of the libraries, and the git commit of this code."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import tomllib
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or the folder that fastmoco is installed in


@cache
def version() -> str:
    """Version of fastmoco, from the installed package or the checkout's pyproject.toml; `unknown` without either."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("fastmoco")
    with suppress(OSError, tomllib.TOMLDecodeError, KeyError):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == "fastmoco":
            return project["version"]
    return "unknown"


@cache
def versions() -> dict[str, str | None]:
    """Versions of fastmoco, its numerical libraries, Python, CUDA and cuDNN; None for what is not installed."""
    import torch  # takes seconds to import, and nothing else here needs it

    libraries: dict[str, str | None] = dict.fromkeys(("torch", "torchvision", "numpy"))
    for name in libraries:
        with suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    cudnn = torch.backends.cudnn.version()
    own = {"fastmoco": version(), "python": platform.python_version()}
    return own | libraries | {"cuda": torch.version.cuda, "cudnn": str(cudnn) if cudnn else None}


@cache
def git_commit() -> str | None:
    """Commit of the checkout that contains this file, with `+` if a tracked file is modified; None if installed."""
    if not (ROOT / ".git").exists():  # an installed copy may be inside the checkout of another project
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
