"""Flags → a frozen dataclass, and what is wrong with them in one line."""

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
    """The arguments of `fastmoco COMMAND` as an instance of the dataclass `kind`.

    flags    all of them, to name the nearest one to an unknown word
    default  where the values of absent flags come from; None for those of the class

    Raises ConfigError; exits for --help.
    """
    import tyro

    asks_for_help = any(argument in ("-h", "--help") for argument in argv)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(sys.stdout if asks_for_help else said):
        try:
            options, unknown = tyro.cli(
                kind,
                prog=f"fastmoco {command}",
                description=description,
                args=argv,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),  # --x and --no-x both, whatever a resumed run had
                default=tyro.MISSING_NONPROP if default is None else default,
            )
        except SystemExit as error:
            if error.code in (0, None):
                raise
            raise ConfigError(_one_line(said.getvalue())) from error
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; {suggestion(unknown[0].split('=')[0], flags)}")
    return options


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?`, or where to look."""
    near = closest(word, known, cutoff=0.5)
    return "see fastmoco --help" if near is None else f"did you mean {near}?"


def _one_line(box: str) -> str:
    """The words of tyro's boxed message, without its heading, its rules and its help text."""
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m|[─-╿]", " ", box).split())
    parts = [part.strip() for part in re.split(r"-{8,}", words)]
    text = next((part for part in parts[1:] if part), words)
    return re.sub(r"^Error parsing \w+: ", "", text)
