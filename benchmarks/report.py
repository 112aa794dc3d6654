"""One page about a folder of results: what is fast, by how much, beside what, and what limits it.

    uv run python benchmarks/report.py DIR                     # DIR/report.md with pictures, DIR/report.html
    uv run python benchmarks/report.py DIR --commit h200       # also benchmarks/results/h200/DATE-COMMIT.{json,md}
    uv run python benchmarks/report.py benchmarks/results/h200/DATE-COMMIT.json

The HTML file holds its pictures and needs nothing else. What is committed names no folder of the machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose pipelines.py hides the package

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from benchmarks.measure.harness import run_script
from benchmarks.reporting.collected import RESULTS, Collection, keep, read
from benchmarks.reporting.headlines import bottlenecks, headlines
from benchmarks.reporting.page import Block, Bullets, Code, Heading, Table, Text, as_html, as_markdown, pictures
from benchmarks.reporting.sections import sections
from fastmoco.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Writes a report of results: Markdown, and HTML in one file."""

    results: Annotated[Path, tyro.conf.Positional]
    """The --out of run_all.py or of a benchmark, or a file of committed results."""
    commit: str | None = None
    """Also keep them in benchmarks/results under this name of the hardware, such as cpu-2core-xeon-amx."""


def main(settings: Settings, committed: Path = RESULTS) -> list[Path]:
    """Writes the report, and what is committed; returns the files to look at. Raises ConfigError and DataError."""
    path = settings.results
    stem = path.with_suffix("") if path.is_file() else path / "report"
    written = write_report(read(path), stem)
    if settings.commit is not None:
        kept = keep(path, settings.commit, committed)
        written += [kept, *write_report(read(kept), kept.with_suffix(""), html=False)]
    return written


def write_report(collection: Collection, stem: Path, *, html: bool = True) -> list[Path]:
    """STEM.md with its pictures STEM-NAME.svg, and STEM.html."""
    title, blocks = "How fast fastmoco is", compose(collection)
    for picture in pictures(blocks):
        write_atomically(stem.with_name(f"{stem.name}-{picture.name}.svg"), picture.svg)
    page = stem.with_name(f"{stem.name}.md")
    write_atomically(page, as_markdown(blocks, lambda name: f"{stem.name}-{name}.svg"))
    if not html:
        return [page]
    whole = stem.with_name(f"{stem.name}.html")
    write_atomically(whole, as_html(title, blocks))
    return [page, whole]


def compose(collection: Collection) -> list[Block]:
    """The page: headlines, bottleneck, tables and pictures, the machine, the commands."""
    blocks: list[Block] = [Heading("How fast fastmoco is", 1)]
    if collection.results:
        blocks.append(Text(_machine(collection.newest)))
    if collection.quick:
        blocks.append(Text("**Measured with --quick: this shows that it works. No figure here says how fast it is.**"))
    blocks.append(
        Text(
            "images/s are images of the data set, two views each. Medians, with quartiles in brackets; cases take "
            "turns, and a ratio is taken round by round."
        )
    )
    if found := headlines(collection):
        blocks += [Heading("In short"), Bullets([str(headline) for headline in found])]
    if limits := bottlenecks(collection):
        blocks += [Heading("What limits"), *(Text(words) for words in limits)]
    blocks += sections(collection)
    blocks += _parts(collection)
    return blocks


def _machine(environment: dict[str, Any]) -> str:
    """Hardware, versions, commit and date in a sentence."""
    gpu = f"{environment['gpu']}, driver {environment['driver']}; " if environment["gpu"] else ""
    versions = environment["versions"]
    shown = ("torch", "torchvision", "cuda", "cudnn", "triton", "dali", "ffcv", "python")
    libraries = ", ".join(f"{name} {versions[name]}" for name in shown if versions.get(name))
    if not environment["gpu"]:
        libraries = libraries.replace(f", cuda {versions['cuda']}, cudnn {versions['cudnn']}", "")
    return (
        f"{gpu}{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']} GiB; {libraries}; "
        f"commit {(environment['git_commit'] or 'unknown')[:7]}, {environment['date'][:10]}."
    )


def _parts(collection: Collection) -> list[Block]:
    """How every part went, and the commands that made the results."""
    blocks: list[Block] = []
    ended = [part for part in collection.parts if part["part"] != "report"]
    if ended:
        rows = [(p["part"], p["state"], f"{p['seconds']:.0f}", f"{p['limit_s']:.0f}") for p in ended]
        blocks += [Heading("How it went"), Table(("part", "ended", "s", "limit s"), rows)]
        blocks += [Text(f"{p['part']}: {p['message']}") for p in ended if p.get("message")]
    commands = [result["environment"]["command"] for result in collection.results.values()]
    if commands:
        blocks += [Heading("Made by"), Code([f"uv run python {command}" for command in dict.fromkeys(commands)])]
    return blocks


def _main() -> None:
    for path in main(tyro.cli(Settings)):
        print(path)


if __name__ == "__main__":
    run_script(_main)
