"""Run a suite of benchmarks one after the other, and write a report.

    uv run python benchmarks/run_all.py --suite cpu --out DIR --data IMAGES         # under 20 minutes on two cores
    uv run python benchmarks/run_all.py --suite gpu --budget 1800                   # the parts that matter most
    uv run python benchmarks/run_all.py --suite gpu --list                          # numbered parts, their limits
    uv run python benchmarks/run_all.py --suite gpu --out DIR --part 2 --data cifar10.tar.xz imagenette.tar

IMAGES has the folders cifar10 and imagenette; they may also be given separately, as folders or tar files. Without
images, all but the accuracy is measured on generated ones. Each part runs in its own process and is stopped at its time
limit; the readings of its whole rounds are kept. After a failure the other parts still run, and the exit code is 1. It
can be interrupted at any time: with the same DIR, parts that are done are skipped. No part needs a network.

With --budget, parts run by priority as long as their limits fit into these seconds, of which earlier commands with the
same DIR have spent some. A machine that ends a command early takes several: each, with --stop-after, starts only what
it can finish. DIR/PART has the results of a part, its output in log.txt and its state in part.json.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.measure.archives import SUFFIXES, unpacked
from benchmarks.measure.budget import SPENT, Budget, in_order, plan, reserved_s
from benchmarks.measure.harness import run_script, write_json
from benchmarks.measure.part_process import kept_readings, last_line, run_limited, stoppable
from benchmarks.measure.suites import DATA, OUT, SUITE_OUT, SUITES, Part, Suite
from benchmarks.reporting.collected import PART, SUITE
from fastmoco.errors import ConfigError
from fastmoco.run.environment import git_commit
from pipelines.errors import how_to_install

SCRIPTS = Path(__file__).resolve().parent
LOG = "log.txt"
DEFAULT_DATA = "FASTMOCO_TEST_DATA"
_OPTIONAL = {
    "nvidia.dali": f"DALI ({how_to_install('dali')})",
    "ffcv": f"FFCV ({how_to_install('ffcv')})",
    "lightly": "lightly (uv sync --inexact --group bench)",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Run a suite of benchmarks, skip what is done, and write a report."""

    suite: Suite
    """Benchmarks and sizes for a kind of machine."""
    out: Path | None = None
    """Folder for results, logs and the report. Unset: runs/benchmarks/SUITE-COMMIT."""
    data: tuple[str, ...] = ()
    """Folders or tar files of cifar10 and imagenette. Unset: FASTMOCO_TEST_DATA, or else generated images."""
    budget: float | None = None
    """Seconds for all commands with this folder: the parts that matter most come first."""
    stop_after: float | None = None
    """Seconds for this command: parts that may take longer are left for the next one."""
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
    out = (settings.out or default_folder(settings)).resolve()
    data = settings.data or tuple(filter(None, [os.environ.get(DEFAULT_DATA)]))
    if settings.budget is not None:
        stopped = [part.name for part in chosen if _was_stopped(out / part.name / PART)]
        chosen = in_order(chosen, stopped)
    budget = Budget(out / SPENT, _or_endless(settings.budget), _or_endless(settings.stop_after))
    if settings.list:
        _list(chosen)
    if settings.budget is not None or settings.stop_after is not None:
        _print_plan(chosen, data, out, settings.quick, budget)
    if settings.list:
        return []
    if settings.suite == "gpu" and parts is None and not settings.quick and not torch.cuda.is_available():
        raise ConfigError(
            "--suite gpu needs a CUDA device, and torch finds none on this machine: use --suite cpu, or --quick to try "
            "every script on this one"
        )
    for module, name in _OPTIONAL.items():
        if not _installed(module):
            print(f"{name} is not installed: its rows are left out")
    if not data and not settings.quick:
        print(f"no images: generated ones are used; set --data or {DEFAULT_DATA} to measure on others")
    print(f"results in {out}")
    suite = {"suite": settings.suite, "quick": settings.quick, "data": [str(Path(entry).absolute()) for entry in data]}
    write_json(out / SUITE, suite)
    records = []
    width = max(len(part.name) for part in chosen)
    try:
        for position, part in enumerate(chosen, start=1):
            print(f"{position:>2}/{len(chosen)}  {part.name:<{width}}  ", end="", flush=True)
            reserved = 0.0 if part.again else reserved_s(chosen[position:])
            record = _run(part, data, out, settings.quick, scripts, budget, reserved)
            print(_line(record, out), flush=True)
            records.append(record)
    finally:
        budget.note()
    return records


def _or_endless(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def default_folder(settings: Settings) -> Path:
    """One for each suite and commit, so that results of different code are never mixed."""
    commit = git_commit()
    name = settings.suite + ("" if commit is None else f"-{commit[:7]}{'+' * commit.endswith('+')}")
    return Path("runs/benchmarks") / (name + "-quick" * settings.quick)


def _list(parts: Sequence[Part]) -> None:
    for number in dict.fromkeys(part.number for part in parts):
        group = [part for part in parts if part.number == number]
        print(f"part {number}, at most {sum(part.limit_s for part in group):.0f} s")
        for part in group:
            print(f"    {part.name}, {part.limit_s:.0f} s: {shlex.join([part.script, *part.arguments])}")


def _print_plan(parts: Sequence[Part], data: Sequence[str], out: Path, quick: bool, budget: Budget) -> None:
    """What will run if every part needs its limit, and what will not."""
    without = [part for part in parts if _lacks_images(part, data, quick)]
    done = [part for part in parts if not part.again and _done_before(out / part.name / PART) is not None]
    planned = plan([part for part in parts if part not in without and part not in done], budget)
    total = "" if math.isinf(budget.total_s) else f" of {budget.total_s:,.0f}"
    print(f"spent {budget.spent_s:,.0f}{total} s; these parts take at most {planned.total_s:,.0f} s:")
    for name, limit_s in planned.limits_s.items():
        print(f"    {name}, {limit_s:.0f} s")
    for part in done:
        print(f"    {part.name}: done before")
    left_out = planned.left_out | {part.name: f"no {part.needs}" for part in without}
    if left_out:
        print("left out, unless others end before their limits:" if planned.left_out else "left out:")
        for name, why in left_out.items():
            print(f"    {name}: {why}")


def _lacks_images(part: Part, data: Sequence[str], quick: bool) -> bool:
    return part.needs is not None and _find(part.needs, data) is None and not _generates(part, data, quick)


def _generates(part: Part, data: Sequence[str], quick: bool) -> bool:
    """Whether a part runs without the images that it needs."""
    return quick or (part.generated and not data)


def _was_stopped(file: Path) -> bool:
    """Whether a part has failed or ran into its limit."""
    return file.is_file() and _done_before(file) is None


def _run(
    part: Part, data: Sequence[str], out: Path, quick: bool, scripts: Path, budget: Budget, reserved_s: float
) -> dict[str, Any]:
    """Run a part, unless it is done, its input is missing or it does not fit into the budget without the time that is
    reserved; and write its record when it has ended."""
    folder = out / part.name
    record: dict[str, Any] = {"part": part.name, "number": part.number, "limit_s": part.limit_s}
    images = None if part.needs is None else find_images(part.needs, data)
    if _lacks_images(part, data, quick):
        where = f"in --data {' '.join(data)}" if data else "are given with --data"
        return record | {"state": "skipped", "message": f"no {part.needs} {where}"}
    if part.after is not None and not any(out.glob(f"*/{part.after}-*.json")):
        return record | {"state": "skipped", "message": f"there is no result of {part.after}, which it needs"}
    command = _command(part, images, folder, out, quick, scripts)
    record["command"] = _shown(part, command)
    if not part.again and (before := _done_before(folder / PART, record["command"])) is not None:
        return before | {"state": "done before"}
    if not part.again:
        if refusal := budget.refusal(part, reserved_s):
            return record | {"state": "left out", "message": refusal}
        record["limit_s"] = limit_s = budget.limit_s(part, reserved_s)
    else:
        limit_s = part.limit_s
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PART).unlink(missing_ok=True)
    print(f"at most {limit_s:.0f} s … ", end="", flush=True)
    began = time.monotonic()
    with (folder / LOG).open("w", encoding="utf-8") as log:
        code = run_limited(command, log, limit_s, budget.note)
    record |= {
        "state": "done" if code == 0 else "timed out" if code is None else "failed",
        "exit_code": code,
        "seconds": round(time.monotonic() - began, 1),
        "git_commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if code != 0:
        record["message"] = last_line(folder / LOG)
        record["kept"] = kept_readings(folder)
    write_json(folder / PART, record)
    return record


def find_images(name: str, data: Sequence[str]) -> str | None:
    """The images `name`, from a folder that contains it, a folder of that name, or a tar file; None if there are none.

    A folder `cifar10` and a file `cifar10-jpeg.tar.xz` are both cifar10, and `cifar100` is not. Tar files are unpacked
    once, into the cache.
    """
    found = _find(name, data)
    return unpacked(found) if found is not None and _is_archive(found) else found


def _find(name: str, data: Sequence[str]) -> str | None:
    """Path of the folder or the tar file."""
    for entry in data:
        path = Path(entry).expanduser()
        if (path / name).is_dir():
            return str((path / name).absolute())
        named = re.match(rf"{re.escape(name)}(?![a-z0-9])", path.name, re.IGNORECASE)
        if named and (path.is_dir() or _is_archive(entry)):
            return str(path.absolute())
    return None


def _is_archive(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not Path(path).is_dir()


def _shown(part: Part, command: Sequence[str]) -> str:
    """A command as it is recorded: without the paths of the interpreter and the script."""
    return shlex.join(["python", f"benchmarks/{part.script}", *command[2:]])


def _command(part: Part, images: str | None, folder: Path, out: Path, quick: bool, scripts: Path) -> list[str]:
    arguments = list(part.arguments)
    if images is None and DATA in arguments:  # generated images
        position = arguments.index(DATA)
        del arguments[position - 1 : position + 1]
    for placeholder, value in ((DATA, images), (OUT, str(folder)), (SUITE_OUT, str(out))):
        arguments = [argument.replace(placeholder, value or placeholder) for argument in arguments]
    return [sys.executable, str(scripts / part.script), *arguments, *(part.quick if quick else ())]


def _done_before(file: Path, command: str | None = None) -> dict[str, Any] | None:
    """The record of a part that is done, with the same command if there is one."""
    with suppress(OSError, ValueError):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["state"] == "done" and command in (None, record["command"]):
            return record
    return None


def _line(record: dict[str, Any], out: Path) -> str:
    state, duration = record["state"], f"{record.get('seconds', 0):.0f} s"
    if state in ("done", "done before"):
        return f"{state}{' in' if state == 'done' else ', in'} {duration}"
    if state in ("skipped", "left out"):
        return f"{state}: {record['message']}"
    end = f"exit code {record['exit_code']} after {duration}" if state == "failed" else f"stopped after {duration}"
    kept = f"; kept {', '.join(record['kept'])}" if record["kept"] else ""
    return f"{state}, {end}: {record['message']} ({out / record['part'] / LOG}){kept}"


def _installed(module: str) -> bool:
    parents = module.split(".")
    return all(importlib.util.find_spec(".".join(parents[: n + 1])) is not None for n in range(len(parents)))


def _main() -> None:
    with stoppable():
        records = main(tyro.cli(Settings))
    failed = [record["part"] for record in records if record["state"] in ("failed", "timed out")]
    if failed:
        print(f"{len(failed)} of {len(records)} parts failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(_main)
