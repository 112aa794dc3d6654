"""Software that a run depends on: library versions and the git commit of this code."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def versions() -> dict[str, str | None]:
    """Versions of fastmoco, its numerical libraries, Python, CUDA and cuDNN; None for what is not installed."""
    import torch  # takes seconds to import, and nothing else here needs it

    libraries: dict[str, str | None] = dict.fromkeys(("fastmoco", "torch", "torchvision", "numpy"))
    for name in libraries:
        with suppress(importlib.metadata.PackageNotFoundError):
            libraries[name] = importlib.metadata.version(name)
    cudnn = torch.backends.cudnn.version()
    python = platform.python_version()
    return libraries | {"python": python, "cuda": torch.version.cuda, "cudnn": str(cudnn) if cudnn else None}


@cache
def git_commit() -> str | None:
    """Commit of the checkout that contains this file, with `+` if a tracked file is modified; None if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed copy may be inside the checkout of another project
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
