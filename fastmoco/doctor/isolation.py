"""Runs each check in a process of its own, so that a crash or a hang is a finding and ends nothing else.

Processes are forked from a server that has imported torch once; Windows starts each anew. This process does not import
torch: where that fails, or takes the process with it, it is a finding too.
"""

from __future__ import annotations

import faulthandler
import gc
import math
import os
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from fastmoco.doctor.findings import Check, Finding, Result, Status, Target
from fastmoco.doctor.units import one_line
from fastmoco.errors import exit_code
from pipelines.errors import BackendMissingError
from pipelines.platforms import clean_context
from pipelines.registry import load

_EXIT_S = 5.0  # until a process has ended; if this one was killed, a check ends itself as long after its limit
_HAS_GROUPS = hasattr(os, "setsid")  # Windows has no process groups, and no alarm
_FATAL = "Fatal Python error: "  # of faulthandler


def run_check(check: Check, target: Target) -> Result:
    """The finding of a check: `failed` for an exception, a crash or a time-out, `missing` for BackendMissingError."""
    began = time.monotonic()
    output = Path(target.scratch) / "output.txt"
    output.write_bytes(b"")
    try:
        finding = _in_process(check, target, output)
    except (OSError, EOFError) as error:  # the server of the processes has died
        finding = Finding(status=Status.FAILED, text=f"no process could be started ({_describe(error)})")
    return Result(check, finding, time.monotonic() - began)


def _in_process(check: Check, target: Target, output: Path) -> Finding:
    context = clean_context(["fastmoco.doctor.preload"])
    receiver, sender = context.Pipe(duplex=False)
    arguments = check, target, sender, str(output)
    process = context.Process(target=_child, args=arguments)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        process.start()
        sender.close()
        if not receiver.poll(check.limit_s):
            return Finding(
                status=Status.FAILED,
                text=f"no result after {check.limit_s:g} s",
                advice="it hangs, or this machine is very busy: try again when it is idle",
            )
        finding = None
        with suppress(EOFError, ConnectionResetError):
            finding = receiver.recv()
        process.join(_EXIT_S)
        return finding or Finding(status=Status.FAILED, text=_how_it_ended(process, output))
    finally:
        receiver.close()
        _end(process)


def _child(check: Check, target: Target, sender: Connection, output: str) -> None:
    """Send the finding of a check. Whatever it prints, also from C, goes to the file `output`."""
    if _HAS_GROUPS:
        os.setsid()  # so that `_end` reaches the processes that the check starts
        signal.alarm(math.ceil(check.limit_s + _EXIT_S))
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable(descriptor)
    finding = attempt(check, target)
    gc.collect()  # ends what the check has started and left in a reference cycle
    sender.send(finding)


def attempt(check: Check, target: Target) -> Finding:
    """The finding of a check in this process; an exception is `missing` or `failed`."""
    try:
        return load(check.run)(target)
    except BackendMissingError as error:
        return Finding(status=Status.MISSING, text=_describe(error))
    except Exception as error:
        return Finding(status=Status.FAILED, text=_describe(error))


def _describe(error: Exception) -> str:
    """The message, after the name of the class if the error is not one of fastmoco's."""
    name = "" if exit_code(error) is not None else f"{type(error).__name__}: "
    return one_line(f"{name}{error}".removesuffix(": "))


def _how_it_ended(process: BaseProcess, output: Path) -> str:
    """`its process was killed by SIGSEGV (Segmentation fault)`, or with the last line that it printed."""
    code = process.exitcode
    text = "its process exited without a result"
    if code is not None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        text = f"its process {how}"
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    fatal = [line.removeprefix(_FATAL) for line in lines if line.startswith(_FATAL)]
    last = (fatal or lines or [""])[-1]
    return text + (f" ({one_line(last)})" if last else "")


def _end(process: BaseProcess) -> None:
    """Kill a check and all processes that it has started."""
    if process.pid is None:
        return
    if _HAS_GROUPS:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # should it not have its own group yet
    else:
        process.terminate()
    process.join(_EXIT_S)
