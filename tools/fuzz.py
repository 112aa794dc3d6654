"""Feed damaged files to every reader of files from elsewhere: `python tools/fuzz.py [TARGET ...] --seconds 60`.

Each input is a small valid file with a few seeded changes. A reader may accept it, or refuse it with its documented
error of one line; anything else is a failure, and so is an input that takes more than a minute. A failing input is kept
in a file, whose path is printed; so is one that ends the process, as a crash in a decoder does.

Exit codes: 0 no failure, 1 a failure, 2 invalid setting.
"""

from __future__ import annotations

import faulthandler
import itertools
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from fastmoco.errors import ExitCode
from tools.fuzz_targets import Target, targets

LONGEST_S = 60.0  # for one input, on a busy machine too
Positional = tyro.conf.Positional


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Feed damaged files to every reader of files from elsewhere."""

    target: Positional[tuple[str, ...]] = ()
    """What to read; everything by default."""
    seconds: float = 60.0
    """Time for each target."""
    seed: int = 0
    """Of the changes: the same seed gives the same inputs."""
    keep: Path = Path("fuzz-failures")
    """The folder for inputs that fail, created when there is one."""


# ---- changes ---------------------------------------------------------------------------------------------------------

_VALUES = [b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'"x"', b"9" * 30, b"9" * 5000, b"[" * 3000]


def _place(data: bytearray, draw: random.Random) -> int:
    """Half of the time near the beginning or the end, where headers and tables are."""
    at = draw.randrange(draw.choice((len(data), min(len(data), 1024))))
    return at if draw.random() < 0.7 else len(data) - 1 - at


def _flip(data: bytearray, draw: random.Random) -> None:
    data[_place(data, draw)] ^= 1 << draw.randrange(8)


def _overwrite(data: bytearray, draw: random.Random) -> None:
    at = _place(data, draw)
    data[at : at + 8] = draw.randbytes(draw.randint(1, 8))[: len(data) - at]


def _extreme_integer(data: bytearray, draw: random.Random) -> None:
    size, at = draw.choice((1, 2, 4, 8)), _place(data, draw)
    value = draw.choice((0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
    data[at : at + size] = value.to_bytes(size, draw.choice(("little", "big")))


def _truncate(data: bytearray, draw: random.Random) -> None:
    del data[_place(data, draw) :]


def _remove(data: bytearray, draw: random.Random) -> None:
    at = _place(data, draw)
    del data[at : at + draw.randint(1, 64)]


def _repeat(data: bytearray, draw: random.Random) -> None:
    at = _place(data, draw)
    data[at:at] = data[at : at + draw.randint(1, 512)] * draw.randint(1, 3)


def _insert(data: bytearray, draw: random.Random) -> None:
    at = _place(data, draw)
    data[at:at] = draw.choice((draw.randbytes(draw.randint(1, 32)), b"\0", b"\n", b"\xff\xd8", "\u2028".encode()))


def _replace_value(data: bytearray, draw: random.Random) -> None:
    """Where there is text: a number or a short string becomes something else."""
    found = list(re.finditer(rb'\d+|"[^"]{0,40}"', data[:100_000]))
    if found:
        start, end = draw.choice(found).span()
        data[start:end] = draw.choice(_VALUES)


CHANGES = (_flip, _overwrite, _extreme_integer, _truncate, _remove, _repeat, _insert, _replace_value)


def changed(data: bytes, draw: random.Random) -> bytes:
    """The data with one to four changes."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if result:
            draw.choice(CHANGES)(result, draw)
    return bytes(result)


# ---- running ---------------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """An input that gave an undocumented error, and that error."""

    name: str
    content: bytes
    error: BaseException


class Outcome(NamedTuple):
    """How many inputs were tried, how many of them were refused, and the first that failed."""

    tried: int
    refused: int
    failure: Failure | None


def fuzz(name: str, target: Target, folder: Path, seed: int, seconds: float, most: int | None = None) -> Outcome:
    """Reads changed samples for some time, or until `most` were tried. `folder` is an empty one for the inputs."""
    (folder / "samples").mkdir(parents=True)
    samples, path = target.samples(folder / "samples"), folder / target.name
    began, refused = time.monotonic(), 0
    for number in itertools.count():
        if time.monotonic() - began > seconds or number == most:
            return Outcome(number, refused, None)
        draw = random.Random(f"{name} {seed} {number}")
        content = changed(draw.choice(samples), draw)
        path.write_bytes(content)
        try:
            target.read(path)
        except target.errors as error:
            refused += 1
            if "\n" in str(error) or not str(error):
                return Outcome(number + 1, refused, Failure(f"{name}-{seed}-{number}", content, error))
        except Exception as error:  # what this program is for
            return Outcome(number + 1, refused, Failure(f"{name}-{seed}-{number}", content, error))
    raise AssertionError


def main(arguments: list[str] | None = None) -> int:
    settings = tyro.cli(Settings, args=arguments, description=Settings.__doc__)
    failed = False
    known = targets()
    if unknown := [name for name in settings.target if name not in known]:
        print(f"{unknown[0]} is not a target: expected {', '.join(known)}", file=sys.stderr)
        return ExitCode.CONFIG
    for name in settings.target or tuple(known):
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        print(f"{name}: inputs are in {folder}", flush=True)
        faulthandler.dump_traceback_later(settings.seconds + LONGEST_S, exit=True, file=sys.__stderr__ or sys.stderr)
        with warnings.catch_warnings(action="ignore"):
            outcome = fuzz(name, known[name], folder / "read", settings.seed, settings.seconds)
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder)
        print(f"{name}: {outcome.tried:,} inputs, {outcome.refused:,} refused", flush=True)
        if outcome.failure is not None:
            failed = True
            settings.keep.mkdir(parents=True, exist_ok=True)
            (settings.keep / outcome.failure.name).write_bytes(outcome.failure.content)
            traceback.print_exception(outcome.failure.error)
            print(f"{name}: failed on {settings.keep / outcome.failure.name}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
