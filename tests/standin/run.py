"""Runs a program in a process of its own, on the stand-in CUDA runtime.

    python -m tests.standin.run step cifar-bf16         prints what the program found, from the project's root

A program is a module of `tests/standin/programs`; the last line that it prints is one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.standin.build import build

ROOT = Path(__file__).parents[2]
_UNSET = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF")


class ProgramError(Exception):
    """A program ended with an error; the text is the end of what it printed."""


def environment() -> dict[str, str]:
    """Environment variables of a process that runs on the stand-in. Raises UnavailableError."""
    libraries = build()
    kept = {name: value for name, value in os.environ.items() if name not in _UNSET}
    return kept | {
        "LD_PRELOAD": " ".join(str(libraries / name) for name in ("libcuda.so.1", "libcudart.so")),
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def run_program(name: str, *arguments: str, timeout_s: float = 800) -> dict[str, Any]:
    """The JSON object that a program of `tests/standin/programs` prints. Raises ProgramError, UnavailableError."""
    command = [sys.executable, "-m", f"tests.standin.programs.{name}", *arguments]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise ProgramError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(lines[-1])


if __name__ == "__main__":
    print(json.dumps(run_program(*sys.argv[1:]), indent=2))
