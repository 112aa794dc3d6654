"""The documentation as data: the fenced blocks of each page, their commands, and the output that is shown for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = {"reliability.md"}  # from tests, and has none
TESTED_ELSEWHERE = {"architecture.md"}  # tests/test_additions.py applies its blocks
DIARY = {"log.md"}  # commands of the past

RUN, SHOWN = {"sh", "python"}, "text"  # what is run, and what the blocks before it on the page print
CHECKED = {"bash", "yaml"}  # scripts and manifests for other machines: their syntax
INDENTED = re.compile(r"    (uv|fastmoco|python|pip|torchrun) ")  # a command in an indented block
NEVER_RUN = {"diff", "json"}


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its opening."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README, CONTRIBUTING and docs/, without those that have tests of their own."""
    left_out = GENERATED | TESTED_ELSEWHERE | DIARY
    docs = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in left_out]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *docs]


def blocks(page: Path) -> list[Block]:
    """Raises ValueError at a block that does not say what it is."""
    found: list[Block] = []
    name, lines = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8").splitlines()
    position = 0
    while position < len(lines):
        opening = re.fullmatch(r"( *)```(.*)", lines[position])
        if not opening and INDENTED.match(lines[position]) and not lines[position - 1].strip():
            found.append(Block(name, position + 1, "sh", lines[position].strip() + "\n"))
        if not opening:
            position += 1
            continue
        start, language = position, opening[2].strip()
        if language not in RUN | {SHOWN} | CHECKED | NEVER_RUN:
            raise ValueError(f"{name}:{start + 1}: a block is sh, python, text, bash or yaml, not {language!r}")
        position += 1
        content: list[str] = []
        while lines[position].strip() != "```":
            content.append(lines[position].removeprefix(opening[1]))
            position += 1
        position += 1
        found.append(Block(name, start + 1, language, "\n".join(content) + "\n"))
    return found


def commands(block: Block) -> list[str]:
    """The commands of a shell block: continued lines joined, comments and empty lines dropped."""
    joined = re.sub(r"\s*\\\n\s*", " ", block.code)
    stripped = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in joined.splitlines())
    return [" ".join(line.split()) for line in stripped if line]


def links(page: Path) -> Iterator[tuple[int, str]]:
    """(line, target) of every link and picture outside of code."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if not fenced:
            for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
                yield number, target


def shape_of(line: str) -> str:
    """A line of output without what differs from run to run: numbers, durations and spacing."""
    numbers = re.sub(r"\d[\d,.]*(e[-+]?\d+)?", "#", line.strip().strip("│╭╰─╮╯ "))
    durations = re.sub(r"(# (d|h|min|s)\b ?)+", "# s ", numbers)
    sizes = re.sub(r"# (B|KB|MB|GB|KiB|MiB|GiB)\b", "# B", durations)
    still = re.sub(r" +# s left$", "", sizes)  # not said by a run that ends before it can be estimated
    return " ".join(re.sub(r"/\S*/", "/", still).split())
