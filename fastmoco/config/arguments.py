"""Parsing of flags into a frozen dataclass, with errors of one line."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterable
from typing import TypeVar

from fastmoco.errors import ConfigError
from pipelines.suggest import closest

T = TypeVar("T")


def parse(
    kind: type[T], argv: list[str], *, command: str, description: str, flags: Iterable[str], default: T | None = None
) -> T:
    """Parse the arguments of `fastmoco COMMAND` into an instance of the dataclass `kind`.

    flags    all flags of the command, to suggest one for an unknown argument
    default  values of absent flags (None: the defaults of the class)

    Raises ConfigError; exits for --help.
    """
    import tyro

    help_requested = any(argument in ("-h", "--help") for argument in argv)
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(sys.stdout if help_requested else output):
        try:
            options, unknown = tyro.cli(
                kind,
                prog=f"fastmoco {command}",
                description=description,
                args=argv,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),  # booleans keep both --x and --no-x
                default=tyro.MISSING_NONPROP if default is None else default,
            )
        except SystemExit as error:
            if error.code in (0, None):
                raise
            raise ConfigError(_one_line(output.getvalue())) from error
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; {suggestion(unknown[0].split('=')[0], flags)}")
    return options


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?` with the closest name, or a reference to --help if none is close."""
    match = closest(word, known, cutoff=0.5)
    return "see fastmoco --help" if match is None else f"did you mean {match}?"


def _one_line(box: str) -> str:
    """The text of tyro's boxed message, without its frame, heading and help text."""
    content = " ".join(re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", box).split())
    sections = [section.strip() for section in re.split(r"-{8,}", content)]
    text = next((section for section in sections[1:] if section), content)
    return re.sub(r"^Error parsing \w+: ", "", text)
