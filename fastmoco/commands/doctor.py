"""`fastmoco doctor`: try every part that training can use on this machine.

Exit code 0 if all that is present works, 6 if any part of it fails. What is missing or not for this device is no
failure: training does without it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console

from fastmoco.commands.doctor_options import DoctorOptions
from fastmoco.console import make_console
from fastmoco.doctor.findings import CHECKS, DEVICE, Check, Result, Status, Target
from fastmoco.doctor.isolation import run_check
from fastmoco.doctor.report import as_json, show
from fastmoco.errors import ExitCode


def doctor_command(
    options: DoctorOptions,
    checks: Sequence[Check] = CHECKS,
    run: Callable[[Check, Target], Result] = run_check,
) -> ExitCode:
    """Run the checks, print the findings and return the exit code."""
    began = time.monotonic()
    console = Console(highlight=False, stderr=True) if options.json else make_console()
    with tempfile.TemporaryDirectory(prefix="fastmoco-doctor-") as scratch:
        target = Target(options.device, os.path.abspath(options.data), scratch)
        results, device = _run_all(console, options, checks, target, run)
    seconds = time.monotonic() - began
    code = ExitCode.DEVICE if any(r.finding.status == Status.FAILED for r in results) else ExitCode.DONE
    if options.json:
        report = as_json(results, version=_version(), device=device, exit_code=code, seconds=seconds)
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        show(console, results, seconds)
    return code


def _run_all(
    console: Console,
    options: DoctorOptions,
    checks: Sequence[Check],
    target: Target,
    run: Callable[[Check, Target], Result],
) -> tuple[list[Result], str]:
    """All results in the order of `checks`, and the device. It comes first: the others need to know it."""
    wanted = [check for check in checks if check.name == DEVICE.name or options.only in (None, check.group)]
    results: dict[Check, Result] = {}
    device = "cpu"  # if there is none, the checks below show what else works
    with console.status("") if console.is_terminal else nullcontext() as status:
        for check in sorted(wanted, key=lambda check: check.name != DEVICE.name):
            if status is not None:
                status.update(f"{check.group}: {check.name}")
            results[check] = run(check, target)
            if check.name == DEVICE.name:
                figures = results[check].finding.figures
                device = figures.get("device", "cpu")
                target = target._replace(device=device, gpus=figures.get("visible", 0))
    return [results[check] for check in wanted], device


def _version() -> str | None:
    try:
        return version("fastmoco")
    except PackageNotFoundError:
        return None
