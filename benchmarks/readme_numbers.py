"""Write the numbers in the README from the latest committed results.

uv run python -m benchmarks.readme_numbers            # rewrites the block between the markers
uv run python -m benchmarks.readme_numbers --check    # fails if the block differs from the results
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.measure.harness import run_script
from benchmarks.reporting.collected import RESULTS, Collection, newest_by_hardware
from benchmarks.reporting.headlines import headlines
from fastmoco.errors import ConfigError
from pipelines.files import write_atomically

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- numbers: written by python -m benchmarks.readme_numbers -->"
END = "<!-- end of numbers -->"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write the README's numbers from benchmarks/results, or check them."""

    check: bool = False
    """Change nothing; fail if they differ."""


def main(settings: Settings, readme: Path = README, results: Path = RESULTS) -> bool:
    """Whether the README was changed. Raises ConfigError without markers or, with `check`, if the numbers differ."""
    text = readme.read_text(encoding="utf-8")
    match = re.search(rf"{re.escape(BEGIN)}\n.*?{re.escape(END)}", text, re.DOTALL)
    if match is None:
        raise ConfigError(f"{readme.name} has no markers for the numbers: expected the lines {BEGIN} and {END}")
    block = numbers(results)
    if match[0] == block:
        return False
    if settings.check:
        raise ConfigError(f"{readme.name} differs from benchmarks/results: run python -m benchmarks.readme_numbers")
    write_atomically(readme, text[: match.start()] + block + text[match.end() :])
    return True


def numbers(results: Path = RESULTS) -> str:
    """The block with its markers: one table per hardware, GPUs first."""
    collections = list(newest_by_hardware(results))
    collections.sort(key=lambda pair: (pair[1].newest["gpu"] is None, pair[0]))
    tables = [_table(hardware, collection) for hardware, collection in collections]
    return "\n\n".join([BEGIN, *tables, END])


def _table(hardware: str, collection: Collection) -> str:
    newest = collection.newest
    machine = newest["gpu"] or f"{newest['cores']} cores of {newest['cpu']}"
    where = f"[benchmarks/results/{hardware}](benchmarks/results/{hardware})"
    rows = ["| | | |", "|---|---:|---|"]
    rows += [f"| {line.subject} | {line.value} | {line.comparison} |" for line in headlines(collection)]
    return f"On {machine}, {newest['date'][:10]} ({where}):\n\n" + "\n".join(rows)


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
