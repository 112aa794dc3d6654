"""Run a suite of benchmarks one after the other, and write a report.

    uv run python benchmarks/run_all.py --suite cpu --out DIR --data IMAGES         # under 20 minutes on two cores
    uv run python benchmarks/run_all.py --suite gpu --list                          # numbered parts, their limits
    uv run python benchmarks/run_all.py --suite gpu --out DIR --part 2 --data cifar10.tar.xz imagenette.tar

IMAGES has the folders cifar10 and imagenette; they may also be given separately, as folders or tar files.
Each part runs in its own process and is stopped at its time limit. After a failure the other parts still run, and the
exit code is 1. It can be interrupted at any time: with the same DIR, parts that are done are skipped. No part needs a
network. DIR/PART has the results of a part, its output in log.txt and its state in part.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro

from benchmarks.measure.archives import SUFFIXES, unpacked
from benchmarks.measure.harness import run_script, write_json
from benchmarks.measure.suites import DATA, OUT, SUITE_OUT, SUITES, Part, Suite
from benchmarks.reporting.collected import PART, SUITE
from fastmoco.errors import ConfigError
from fastmoco.run.environment import git_commit

SCRIPTS = Path(__file__).resolve().parent
LOG = "log.txt"
DEFAULT_DATA = "FASTMOCO_TEST_DATA"
GRACE_S = 10.0  # between SIGTERM and SIGKILL
_OPTIONAL = {
    "nvidia.dali": "DALI (uv sync --extra dali)",
    "ffcv": "FFCV (uv sync --extra ffcv)",
    "lightly": "lightly (uv sync --group bench)",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Run a suite of benchmarks, skip what is done, and write a report."""

    suite: Suite
    """Benchmarks and sizes for a kind of machine."""
    out: Path | None = None
    """Folder for results, logs and the report."""
    data: tuple[str, ...] = ()
    """Folders or tar files of cifar10 and imagenette. Unset: the environment variable FASTMOCO_TEST_DATA."""
    part: int | None = None
    """Run only the parts with this number."""
    list: bool = False
    """Only print the parts with their numbers, limits and commands."""
    patience: float = 1.0
    """Factor on all time limits, for slow or busy machines."""
    quick: bool = False
    """Run every script with --quick, to check that everything works. Without data, on generated images."""


def main(settings: Settings, parts: Sequence[Part] | None = None, scripts: Path = SCRIPTS) -> list[dict[str, Any]]:
    """Run the parts and return their records. Raises ConfigError."""
    chosen = [
        replace(part, limit_s=part.limit_s * settings.patience)
        for part in (SUITES[settings.suite] if parts is None else parts)
    ]
    if settings.part is not None:
        chosen = [part for part in chosen if part.number == settings.part]
        if not chosen:
            numbers = sorted({part.number for part in SUITES[settings.suite]})
            raise ConfigError(f"--part {settings.part} does not exist in {settings.suite}: expected one of {numbers}")
    if settings.list:
        _list(chosen)
        return []
    if settings.out is None:
        raise ConfigError("name a folder for the results with --out")
    data = settings.data or tuple(filter(None, [os.environ.get(DEFAULT_DATA)]))
    if not data and not settings.quick:
        raise ConfigError(
            f"no images: set --data, or the environment variable {DEFAULT_DATA}, to a folder with cifar10 and "
            "imagenette or to their tar files"
        )
    for module, name in _OPTIONAL.items():
        if not _installed(module):
            print(f"{name} is not installed: its rows are left out")
    out = settings.out.resolve()
    suite = {"suite": settings.suite, "quick": settings.quick, "data": [str(Path(entry).absolute()) for entry in data]}
    write_json(out / SUITE, suite)
    records = []
    width = max(len(part.name) for part in chosen)
    for position, part in enumerate(chosen, start=1):
        print(f"{position:>2}/{len(chosen)}  {part.name:<{width}}  ", end="", flush=True)
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
    """Run a part, unless it is done or its input is missing, and write its record when it has ended."""
    folder = out / part.name
    record: dict[str, Any] = {"part": part.name, "number": part.number, "limit_s": part.limit_s}
    images = None if part.needs is None else find_images(part.needs, data)
    if part.needs is not None and images is None and not quick:
        return record | {"state": "skipped", "message": f"no {part.needs} in --data {' '.join(data)}"}
    if part.after is not None and not any(out.glob(f"*/{part.after}-*.json")):
        return record | {"state": "skipped", "message": f"there is no result of {part.after}, which it needs"}
    command = _command(part, images, folder, out, quick, scripts)
    record["command"] = shlex.join(["python", f"benchmarks/{part.script}", *command[2:]])
    if not part.again and (before := _done_before(folder / PART, record["command"])) is not None:
        return before | {"state": "done before"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PART).unlink(missing_ok=True)
    print(f"at most {part.limit_s:.0f} s … ", end="", flush=True)
    began = time.monotonic()
    with (folder / LOG).open("w", encoding="utf-8") as log:
        code = _exit_code(command, log, part.limit_s)
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
    """The images `name`, from a folder that contains it, a folder of that name, or a tar file; None if there are none.

    A folder `cifar10` and a file `cifar10-jpeg.tar.xz` are both cifar10. Tar files are unpacked once, into the cache.
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
    if images is None and DATA in arguments:  # generated images
        position = arguments.index(DATA)
        del arguments[position - 1 : position + 1]
    for placeholder, value in ((DATA, images), (OUT, str(folder)), (SUITE_OUT, str(out))):
        arguments = [argument.replace(placeholder, value or placeholder) for argument in arguments]
    return [sys.executable, str(scripts / part.script), *arguments, *(part.quick if quick else ())]


def _done_before(file: Path, command: str) -> dict[str, Any] | None:
    """The record of a part that is done with the same command."""
    with suppress(OSError, ValueError):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["state"] == "done" and record["command"] == command:
            return record
    return None


def _exit_code(command: Sequence[str], log: Any, limit_s: float) -> int | None:
    """The exit code, or None at the time limit. All processes that it started are stopped."""
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
    """Stop the whole process group: workers of a script that was killed would continue."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
            break
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def _line(record: dict[str, Any], out: Path) -> str:
    state, duration = record["state"], f"{record.get('seconds', 0):.0f} s"
    if state in ("done", "done before"):
        return f"{state}{' in' if state == 'done' else ', in'} {duration}"
    if state == "skipped":
        return f"skipped: {record['message']}"
    end = f"exit code {record['exit_code']} after {duration}" if state == "failed" else f"stopped after {duration}"
    return f"{state}, {end}: {record['message']} ({out / record['part'] / LOG})"


def _installed(module: str) -> bool:
    parents = module.split(".")
    return all(importlib.util.find_spec(".".join(parents[: n + 1])) is not None for n in range(len(parents)))


@contextmanager
def _stoppable() -> Iterator[None]:
    """Make SIGTERM raise SystemExit, so that the running part is stopped too."""
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
