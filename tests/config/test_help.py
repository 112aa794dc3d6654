"""Help: two screens of an 80-column terminal, defaults in words, and every flag somewhere."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from fastmoco.cli import COMMANDS, main
from fastmoco.config import RunConfig
from fastmoco.config.fields import options_of
from fastmoco.config.flags import REPEATED, flags_of
from fastmoco.config.help import FLAGS_WIDTH, RARE, default_words, help_text
from fastmoco.registry import COMMAND_OPTIONS
from pipelines.registry import load

MAX_LINES = 100
ROOT = Path(__file__).parents[2]
KINDS = {name: load(target) for name, target in COMMAND_OPTIONS.items() if target}
OWN = [name for name in KINDS if name != "sweep"]  # it has the flags of train, which its --help refers to


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main(list(argv)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal(monkeypatch, capsys, command: str, flag: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(capsys, command, flag)
    assert lines[0].startswith(f"usage: fastmoco {command}")
    assert max(map(len, lines)) <= columns
    if flag == "--help":
        assert len(lines) <= MAX_LINES
    text = "\n".join(lines)
    assert "None" not in text
    assert not re.search("[─-╿]", text), "frames break what one copies"


@pytest.mark.parametrize("command", OWN)
def test_auto_is_explained(command: str) -> None:
    for option in options_of(KINDS[command]):
        words = default_words(option)
        assert "None" not in words
        if option.default == "auto":
            assert words.startswith("auto: "), f"the docstring of {option.name} needs (auto: what that does)"


@pytest.mark.parametrize("command", OWN)
def test_all_flags_are_in_help_all_and_the_frequent_ones_in_help(capsys, command: str) -> None:
    short, everything = ("\n".join(shown(capsys, command, flag)) for flag in ("--help", "--help-all"))
    for option in options_of(KINDS[command]):
        for name in option.flags:
            pattern = re.escape(name).replace(r"\-\-", r"--(\[no-\])?", 1)
            assert re.search(rf"^  .*{pattern}\b", everything, re.MULTILINE), name
            assert bool(re.search(rf"^  .*{pattern}(?![\w-])", short, re.MULTILINE)) == (option.name not in RARE), name


def test_options_have_the_flags_that_are_parsed() -> None:
    for kind in KINDS.values():
        given = {name for option in options_of(kind) for name in option.flags}
        opposites = {"--no-" + o.flags[-1][2:] for o in options_of(kind) if o.has_opposite}
        assert given | opposites | {"-h", "--help", "--help-all"} == set(flags_of(kind).takes)


def test_rare_flags_exist() -> None:
    tools = [importlib.import_module(name).Settings for name in ("tools.make_ffcv", "tools.make_shards")]
    known = {option.name for kind in [*KINDS.values(), *tools] for option in options_of(kind)}
    assert known >= RARE


def test_help_of_a_recipe_has_its_defaults(capsys) -> None:
    lines = shown(capsys, "train", "imagenet-v2", "--help")
    assert any(re.fullmatch(r"  --moco-t X +Softmax temperature \[0\.2\]", line) for line in lines)
    assert any(line.startswith("  --[no-]mlp ") and line.endswith("[on]") for line in lines)


@dataclass
class Sample:
    """Settings of a sample: the rest is not shown."""

    names: Annotated[tuple[str, ...], REPEATED] = ("a", "b")
    """Names of things."""
    rate: float | None = None
    """Rate of things; more about it (None: from the data; less for few)."""
    mode: Literal["auto", "on"] = "auto"
    """Mode: what it is (auto: on)."""
    fast: bool = False
    """Faster. And worse, e.g. for small things."""


def test_layout() -> None:
    short, everything = (
        help_text("x y", options_of(Sample), "About.", everything=everything, width=60) for everything in (False, True)
    )
    assert short.splitlines() == [
        "usage: x y [FLAGS]",
        "",
        "About.",
        "",
        "Settings of a sample:",
        "  --names TEXT            Names of things [a b]",
        "  --rate X                Rate of things [from the data]",
        "  --mode auto|on          Mode [auto: on]",
        "  --fast                  Faster",
        "",
        "[ ] is the default, --no-x the opposite of --x.",
        "All of each explanation: x y --help-all",
    ]
    assert everything.splitlines()[6:-2] == [
        "  --rate X                Rate of things; more about it",
        "                          [from the data; less for few]",
        "  --mode auto|on          Mode: what it is [auto: on]",
        "  --fast                  Faster. And worse, e.g. for small",
        "                          things",
    ]
    assert FLAGS_WIDTH == 24


@pytest.mark.parametrize("name", ["make_ffcv.py", "make_shards.py"])
def test_help_of_tools(name: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / name), "--help-all"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.startswith(f"usage: {name} DATA OUT [FLAGS]\n")
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize("line", ["--help", "recipes", "recipes imagenet-v2", "train --help", "train --help-all"])
def test_a_reader_that_has_seen_enough_is_no_error(line: str) -> None:
    """As with `| head -1`: the pipe is closed before anything is written to it."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fastmoco", *shlex.split(line)]
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_field_names_are_unique_across_the_groups() -> None:
    """Defaults and RARE are by name."""
    names = [option.name for option in options_of(RunConfig)]
    assert len(names) == len({*names}) == len(RunConfig().flat())
