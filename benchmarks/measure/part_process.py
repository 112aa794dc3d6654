"""The process of a part: run up to a time limit, stopped with all that it has started, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTE_EVERY_S = 10.0
GRACE_S = 10.0  # between SIGTERM and SIGKILL


def run_limited(command: Sequence[str], log: Any, limit_s: float, note: Callable[[], None]) -> int | None:
    """The exit code, or None at the time limit. All processes that it started are stopped.

    `note` is called every NOTE_EVERY_S, for what this process should have written when it is killed.
    """
    # The scripts find their packages where fastmoco is not installed.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    deadline = time.monotonic() + limit_s
    try:
        while (left_s := deadline - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(min(left_s, NOTE_EVERY_S))
            note()
        return None
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the whole process group: workers of a script that was killed would continue."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
            break
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def kept_readings(folder: Path) -> list[str]:
    """What a part that was stopped has written: the rounds of each of its results."""
    kept = []
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            result = json.loads(file.read_text(encoding="utf-8"))
            kept.append(f"{result['rounds']} of {result['planned_rounds']} rounds of {file.stem}")
    return kept


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM raise SystemExit, so that the running part is stopped too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
