"""What a command prints: its form, chosen by --quiet and --json, and its end, when the reader may have gone or the disk
may be full."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import Enum
from importlib.metadata import version
from typing import Any, TextIO

from fastmoco.errors import ExitCode
from pipelines.files import is_full
from pipelines.platforms import silence


class Form(Enum):
    """Form of the output of a command; the value is the flag.

    TEXT   tables and progress on standard output
    QUIET  the result as one line on standard output, warnings and errors on standard error
    JSON   one JSON object a line on standard output, each with a string `event`; all text on standard error
    """

    TEXT = ""
    QUIET = "--quiet"
    JSON = "--json"


_form: ContextVar[Form] = ContextVar("form", default=Form.TEXT)


def take_form(argv: list[str]) -> tuple[Form, list[str]]:
    """The form that the arguments of a program ask for, and the arguments without its flags; the last flag wins.

    `doctor --json` stays: its report is one JSON object.
    """
    own = {form.value: form for form in (Form.QUIET, Form.JSON) if (argv[:1], form) != (["doctor"], Form.JSON)}
    given = [own[argument] for argument in argv if argument in own]
    return (given[-1] if given else Form.TEXT), [argument for argument in argv if argument not in own]


@contextmanager
def output_in(form: Form) -> Iterator[None]:
    """Consoles that are made in this block print in a form."""
    token = _form.set(form)
    try:
        yield
    finally:
        _form.reset(token)


def output_form() -> Form:
    """The form of the output of this command."""
    return _form.get()


def write_event(event: str, values: dict[str, Any]) -> None:
    """Print one JSON line on standard output; NaN and infinities become null."""
    print(json.dumps({"event": event} | finite(values), allow_nan=False), flush=True)


def finite(value: Any) -> Any:
    """The value with None for every NaN and infinity in it, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


class LossyOutput:
    """Standard output that may be lost: its terminal was closed, or what read it, such as `head`, has ended.

    The command goes on to its end, since its files are as wanted as before. That of a log is also lost on a full disk.
    """

    def __init__(self, stream: TextIO, is_log: bool) -> None:
        self._stream, self._is_log = stream, is_log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EIO, errno.EPIPE):
                silence(self._stream.fileno())
            elif not (self._is_log and is_full(error)):
                raise


def announce(doing: str, *, is_log: bool = False) -> None:
    """Print what a command begins with, before the imports that take seconds; not if its output is for programs.

    is_log  whether standard output is a log, where the line belongs; otherwise only a terminal gets it, on stderr
    """
    if output_form() != Form.TEXT or "RANK" in os.environ:  # torchrun's ranks have been announced
        return
    stream = sys.stdout if is_log else sys.stderr
    if is_log or stream.isatty():
        line = f"fastmoco {version('fastmoco')}: {doing if doing.isprintable() else ascii(doing)}"
        encoding = stream.encoding or "ascii"
        with suppress(OSError):
            print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def say_error(line: str) -> None:
    """Print a line on standard error; a log on a full disk must not change the exit code."""
    with suppress(OSError):
        print(f"fastmoco: {line}", file=sys.stderr)


def end_output(code: int, *, is_log: bool) -> int:
    """Write what was printed, and return the exit code: 4 if a full disk does not take the result of a command.

    What cannot be written is thrown away: Python would try again when it ends, and exit with 120.

    is_log  whether the result is in files, so that the code stays
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:  # or BrokenPipeError: whoever read it, such as `head`, has seen enough
            with suppress(OSError, ValueError):  # a stream without a descriptor
                silence(stream.fileno())
            if is_full(error) and code == ExitCode.DONE and not is_log:
                code = ExitCode.CHECKPOINT
                say_error(f"error: cannot write the output ({error.strerror}): free space")
    return code


def run_tool(main: Callable[[], int]) -> int:
    """The exit code of a program that writes its results to files, also for --help and without a reader."""
    try:
        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else ExitCode.DONE
    except BrokenPipeError:
        code = ExitCode.DONE
    return end_output(code, is_log=True)
