"""What the documentation says is true: every command and example in it runs, and prints what is shown.

treatments.py lists what is shortened or only checked, with the reason; a new block is run as it is.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from fastmoco.cli import USAGE
from tests.docs import treatments
from tests.docs.installed_names import unknown
from tests.docs.pages import CHECKED, ROOT, RUN, SHOWN, Block, blocks, commands, links, pages, shape_of
from tests.docs.workplace import Workplace

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
SKIPPED_OUTPUT = {"", "...", "…"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that pages call runs/NAME: of small photographs in three classes."""
    place = Workplace(tmp_path_factory.mktemp("trained"))
    done = place.run(
        f"fastmoco train --data photos --arch resnet18 --out runs/NAME {treatments.FEW} --epochs 1 --knn-every 0"
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return place.folder / "runs" / "NAME"


class Installed(NamedTuple):
    """What the commands of a page are checked with.

    require   skips or fails the test without a package, of tests/conftest.py
    flags_of  the flags that a program explains: under --help-all, where it has that
    """

    require: Callable[[str], None]
    flags_of: Callable[[tuple[str, ...]], frozenset[str]]


@pytest.fixture(scope="module")
def installed(require_backend: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = Workplace(tmp_path_factory.mktemp("help"))

    @cache
    def flags_of(program: tuple[str, ...]) -> frozenset[str]:
        shown = place.run([*program, "--help-all"])
        if shown.returncode != 0:
            shown = place.run([*program, "--help"])
        return frozenset(re.findall(r"--[a-z][\w-]*", shown.stdout))

    return Installed(require_backend, flags_of)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", PAGES)
def test_every_command_and_example_of_the_page_works(
    name: str, trained: Path, installed: Installed, tmp_path: Path
) -> None:
    place, output = Workplace(tmp_path / "place", trained), ""
    for block in blocks(PAGES[name]):
        if block.language in RUN:
            output += run_block(place, block, installed)
        if block.language == SHOWN and first_line(block) not in treatments.NOT_PRINTED_HERE:
            missing = missing_lines(block.code, output)
            assert missing == [], f"{block}: these lines are not printed:\n{missing}\nin\n{output}"


def first_line(block: Block) -> str:
    return " ".join(block.code.splitlines()[0].split())


def run_block(place: Workplace, block: Block, installed: Installed) -> str:
    """What the commands or the code print. Fails at the first that does."""
    if block.language == "python":
        done = place.run([sys.executable, "-c", block.code])
        assert done.returncode == 0, f"{block}:\n{done.stdout[-3000:]}"
        return done.stdout
    printed = ""
    for command in commands(block):
        for part, package in treatments.NEEDS.items():
            if part in command:
                installed.require(package)
        if treatments.reason_not_run(command):
            assert_known(command, installed)
            continue
        if re.fullmatch(r'[A-Z_]+=(\S*|"[^"]*")', command):
            place.variables.append(command)
            continue
        run = treatments.as_run(command)
        done = place.run(run)
        assert done.returncode == 0, f"{block}: {run}\nexit code {done.returncode}\n{done.stdout[-3000:]}"
        printed += done.stdout
    return printed


def missing_lines(shown: str, output: str) -> list[str]:
    """The lines shown that are not in the output, whatever their numbers."""
    printed = {shape_of(line) for line in output.splitlines()}
    return [line for line in shown.splitlines() if line.strip() not in SKIPPED_OUTPUT and shape_of(line) not in printed]


def assert_known(command: str, installed: Installed) -> None:
    """The scripts of a command exist, and its flags are in their help."""
    for part in re.split(r"&&|\||-m (?=fastmoco)", command):
        words = [word for word in shlex.split(part) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        words = words[2:] if words[:2] == ["uv", "run"] else words
        files = [word for word in words if word.endswith(".py") or word.startswith(".ci/")]
        assert all((ROOT / file).exists() for file in files), f"{command}: no such file"
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        program = words[:2] if words[0] in ("python", "fastmoco", "mkdocs", "ruff") else words[:1]
        assert not flags or flags <= installed.flags_of(tuple(program)), f"{command}: unknown flag"


@pytest.mark.parametrize("name", PAGES)
def test_scripts_for_other_machines_parse(name: str) -> None:
    for block in blocks(PAGES[name]):
        if block.language not in CHECKED:
            continue
        if block.language == "yaml":
            assert [*yaml.safe_load_all(block.code)], block
            continue
        done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}: {done.stderr}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Files beside the page, headings in them; addresses of other hosts are well-formed (and not opened)."""
    for line, target in links(PAGES[name]):
        where = f"{name}:{line}: {target}"
        if re.match(r"[a-z]+:", target):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/[\w./#?=&%~:@+-]*)?", target), where
            continue
        path, _, anchor = target.partition("#")
        file = PAGES[name].parent / path if path else PAGES[name]
        assert file.exists(), where
        if anchor:
            assert anchor in headings(file), where


def headings(page: Path) -> set[str]:
    """Anchors as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).strip().replace(" ", "-") for title in titles}


def test_no_treatment_is_of_a_line_that_is_gone() -> None:
    every = [block for page in PAGES.values() for block in blocks(page)]
    lines = {command for block in every if block.language == "sh" for command in commands(block)}
    assert {*treatments.INSTEAD, *treatments.ONLY_CHECKED} <= lines
    assert {*treatments.NOT_PRINTED_HERE} <= {first_line(block) for block in every if block.language == SHOWN}


def test_a_name_that_pyproject_has_not_is_found() -> None:
    assert unknown(["sync", "--extra", "ffcv", "--group", "bench"]) == []
    assert unknown(["sync", "--extra", "fcv", "--group", "bench", "--extra", "dalli"]) == ["fcv", "dalli"]


def test_numbers_may_differ_and_words_may_not() -> None:
    output = "before training: kNN 41.8 %\nabout 1 min 54 s on this machine\n  folder   /a/b/runs/x\n"
    shown = "before training: kNN 12 %\nabout 9 s on this machine\n  folder  /home/runs/x\n..."
    assert missing_lines(shown, output) == []
    assert missing_lines("after training: kNN 41.8 %", output) == ["after training: kNN 41.8 %"]


def test_a_block_is_fenced_or_an_indented_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("- a\n\n    not one\n\n    uv run it\n\n```sh\nls\n```\n\n  ```text\n  a\n  ```\n")
    assert [(block.line, block.language, block.code) for block in blocks(page)] == [
        (5, "sh", "uv run it\n"),
        (7, "sh", "ls\n"),
        (11, "text", "a\n"),
    ]
    page.write_text("```\nls\n```\n")
    with pytest.raises(ValueError, match=r"page.md:1: a block is sh, python, text"):
        blocks(page)


def test_commands_are_whole_lines() -> None:
    code = "a b  # why\n# a comment\n\nc \\\n  --flag 1\nd#e\n"
    assert commands(Block("page", 1, "sh", code)) == ["a b", "c --flag 1", "d#e"]


# Flags of other programs in the text, and pages that are about others.
FLAGS_OF_OTHERS = (
    "--extra --group --only-group --inexact",  # uv
    "--nnodes --max-restarts",  # torchrun
    "--ipc --shm-size",  # docker
    "--logdir",  # tensorboard
    "--pretrained",  # main_lincls.py of facebookresearch/moco
)
ABOUT_OTHERS = {"docs/tutorials/from-other-trainers.md", "CONTRIBUTING.md"}
COMMANDS = ("train", "eval", "embed", "export", "report", "views", "watch", "scan", "sweep", "doctor")
SCRIPTS = ("tools/make_ffcv.py", "tools/make_shards.py", "benchmarks/scaling.py", "benchmarks/expected_efficiency.py")


@pytest.fixture(scope="module")
def known_flags(installed: Installed) -> frozenset[str]:
    programs = [("fastmoco", command) for command in COMMANDS] + [("python", script) for script in SCRIPTS]
    helps = [installed.flags_of(program) for program in programs]
    assert all(helps)
    of_all = re.findall(r"--[a-z][a-z0-9-]*", USAGE)
    return frozenset().union(*helps, of_all, " ".join(FLAGS_OF_OTHERS).split())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PAGES.keys() - ABOUT_OTHERS))
def test_every_flag_in_the_text_exists(name: str, known_flags: frozenset[str]) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", PAGES[name].read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", text)
    flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", span)}
    assert flags - known_flags == set()
