"""Every benchmark, one after the other, and a report of what they found.

    uv run python benchmarks/run_all.py --suite cpu --out DIR --data IMAGES         # under 20 minutes on two cores
    uv run python benchmarks/run_all.py --suite gpu --list                          # numbered parts, their limits
    uv run python benchmarks/run_all.py --suite gpu --out DIR --part 2 --data cifar10.tar.xz imagenette.tar

IMAGES holds folders cifar10 and imagenette; each may also be named by itself, as a folder or a tar file.
A part runs in a process of its own and is stopped at its limit. What failed is told and recorded, and the rest goes on;
the exit code is then 1. Started again with the same DIR, parts that are done are skipped: interrupt it at any time. No
part needs a network. DIR/PART holds what a part wrote, its output in log.txt, and in part.json how it went.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose pipelines.py hides the package

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import tyro

from benchmarks.measure.archives import SUFFIXES, unpacked
from benchmarks.measure.harness import run_script, write_json
from benchmarks.measure.suites import DATA, OUT, SUITES, WHOLE, Part, Suite
from benchmarks.reporting.collected import PART, SUITE
from fastmoco.errors import ConfigError
from fastmoco.run.environment import git_commit

SCRIPTS = Path(__file__).resolve().parent
LOG = "log.txt"
DEFAULT_DATA = "FASTMOCO_TEST_DATA"
GRACE_S = 10.0  # between asking a process to stop and stopping it
_OPTIONAL = {
    "nvidia.dali": "DALI (uv sync --extra dali)",
    "ffcv": "FFCV (uv sync --extra ffcv)",
    "lightly": "lightly (uv sync --group bench)",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Runs a whole suite of benchmarks, skips what is done, and writes a report."""

    suite: Suite
    """The sizes that suit a machine."""
    out: Path | None = None
    """Folder for results, logs and the report."""
    data: tuple[str, ...] = ()
    """Folders or tar files of cifar10 and imagenette. Unset: the environment's FASTMOCO_TEST_DATA."""
    part: int | None = None
    """Only the parts of this number."""
    list: bool = False
    """Print the parts with their numbers, limits and commands, and run nothing."""
    patience: float = 1.0
    """Factor on every limit, for slower or busy machines."""
    quick: bool = False
    """Every script with --quick: whether it works, not how fast it is. Without data, on drawn images."""


def main(settings: Settings, parts: Sequence[Part] | None = None, scripts: Path = SCRIPTS) -> list[dict[str, Any]]:
    """Runs the parts and returns their records. Raises ConfigError."""
    chosen = [
        replace(part, limit_s=part.limit_s * settings.patience)
        for part in (SUITES[settings.suite] if parts is None else parts)
    ]
    if settings.part is not None:
        chosen = [part for part in chosen if part.number == settings.part]
        if not chosen:
            numbers = sorted({part.number for part in SUITES[settings.suite]})
            raise ConfigError(f"--part {settings.part} is none of {settings.suite}'s: expected one of {numbers}")
    if settings.list:
        _list(chosen)
        return []
    if settings.out is None:
        raise ConfigError("name a folder for the results with --out")
    data = settings.data or tuple(filter(None, [os.environ.get(DEFAULT_DATA)]))
    if not data and not settings.quick:
        raise ConfigError(
            f"no images: name a folder that holds cifar10 and imagenette, or their tar files, with --data "
            f"or in the environment's {DEFAULT_DATA}"
        )
    for module, name in _OPTIONAL.items():
        if not _installed(module):
            print(f"without {name}: its rows are left out")
    out = settings.out.resolve()
    suite = {"suite": settings.suite, "quick": settings.quick, "data": [str(Path(entry).absolute()) for entry in data]}
    write_json(out / SUITE, suite)
    records = []
    width = max(len(part.name) for part in chosen)
    for place, part in enumerate(chosen, start=1):
        print(f"{place:>2}/{len(chosen)}  {part.name:<{width}}  ", end="", flush=True)
        record = _run(part, data, out, settings.quick, scripts)
        print(_line(record, out), flush=True)
        records.append(record)
    return records


def _list(parts: Sequence[Part]) -> None:
    for number in dict.fromkeys(part.number for part in parts):
        group = [part for part in parts if part.number == number]
        print(f"part {number}, at most {sum(part.limit_s for part in group):.0f} s")
        for part in group:
            print(f"    {part.name}, {part.limit_s:.0f} s: {shlex.join([part.script, *part.arguments])}")


def _run(part: Part, data: Sequence[str], out: Path, quick: bool, scripts: Path) -> dict[str, Any]:
    """One part, unless it is done or lacks what it needs; its record is written once it has ended."""
    folder = out / part.name
    record: dict[str, Any] = {"part": part.name, "number": part.number, "limit_s": part.limit_s}
    images = None if part.needs is None else find_images(part.needs, data)
    if part.needs is not None and images is None and not quick:
        return record | {"state": "skipped", "message": f"no {part.needs} in --data {' '.join(data)}"}
    if part.after is not None and not any(out.glob(f"*/{part.after}-*.json")):
        return record | {"state": "skipped", "message": f"there is no result of {part.after} to start from"}
    command = _command(part, images, folder, out, quick, scripts)
    record["command"] = shlex.join(["python", f"benchmarks/{part.script}", *command[2:]])
    if not part.again and (before := _done_before(folder / PART, record["command"])) is not None:
        return before | {"state": "done before"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PART).unlink(missing_ok=True)
    print(f"at most {part.limit_s:.0f} s … ", end="", flush=True)
    began = time.monotonic()
    with (folder / LOG).open("w", encoding="utf-8") as log:
        code = _call(command, log, part.limit_s)
    record |= {
        "state": "done" if code == 0 else "timed out" if code is None else "failed",
        "exit_code": code,
        "seconds": round(time.monotonic() - began, 1),
        "git_commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if code != 0:
        record["message"] = _last_line(folder / LOG)
    write_json(folder / PART, record)
    return record


def find_images(name: str, data: Sequence[str]) -> str | None:
    """The folder of this name in one of the places, one that bears the name itself, or what its tar file holds.

    A folder `cifar10` or a file `cifar10-jpeg.tar.xz` both are cifar10. Tar files are unpacked once, into the cache.
    """
    for entry in data:
        path = Path(entry).expanduser()
        if (path / name).is_dir():
            return str((path / name).absolute())
        if path.name.startswith(name) and (path.is_dir() or entry.lower().endswith(SUFFIXES)):
            return unpacked(str(path.absolute()))
    return None


def _command(part: Part, images: str | None, folder: Path, out: Path, quick: bool, scripts: Path) -> list[str]:
    arguments = list(part.arguments)
    if images is None and DATA in arguments:  # drawn images then; a limit goes with the data
        at = arguments.index(DATA)
        del arguments[at - 1 : at + 1]
    for mark, value in ((DATA, images), (OUT, str(folder)), (WHOLE, str(out))):
        arguments = [argument.replace(mark, value or mark) for argument in arguments]
    return [sys.executable, str(scripts / part.script), *arguments, *(part.quick if quick else ())]


def _done_before(file: Path, command: str) -> dict[str, Any] | None:
    """The record of a part that is done, by the same command."""
    with suppress(OSError, ValueError):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["state"] == "done" and record["command"] == command:
            return record
    return None


def _call(command: Sequence[str], log: Any, limit_s: float) -> int | None:
    """The exit code, or None where the limit came first. Nothing it started outlives it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=SCRIPTS.parent,
        env=environment,
        start_new_session=True,
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole process group: workers of a script that was killed would go on."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            break
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def _line(record: dict[str, Any], out: Path) -> str:
    state, took = record["state"], f"{record.get('seconds', 0):.0f} s"
    if state in ("done", "done before"):
        return f"{state}{' in' if state == 'done' else ', in'} {took}"
    if state == "skipped":
        return f"skipped: {record['message']}"
    how = f"exit code {record['exit_code']} after {took}" if state == "failed" else f"stopped after {took}"
    return f"{state}, {how}: {record['message']} ({out / record['part'] / LOG})"


def _installed(module: str) -> bool:
    parents = module.split(".")
    return all(importlib.util.find_spec(".".join(parents[: n + 1])) is not None for n in range(len(parents)))


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the part that runs, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _main() -> None:
    with _stoppable():
        records = main(tyro.cli(Settings))
    failed = [record["part"] for record in records if record["state"] in ("failed", "timed out")]
    if failed:
        print(f"{len(failed)} of {len(records)} parts failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(_main)
