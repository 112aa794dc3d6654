"""Report on a folder of results: rates, comparisons, bottlenecks, tables and pictures.

    uv run python benchmarks/report.py DIR                     # DIR/report.md with pictures, DIR/report.html
    uv run python benchmarks/report.py DIR --commit h200       # also benchmarks/results/h200/DATE-COMMIT.{json,md}
    uv run python benchmarks/report.py benchmarks/results/h200/DATE-COMMIT.json

The HTML file is self-contained. Committed results contain no paths of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.measure.harness import run_script
from benchmarks.reporting.collected import RESULTS, Collection, keep, read
from benchmarks.reporting.headlines import bottlenecks, headlines
from benchmarks.reporting.page import Block, Bullets, Code, Heading, Table, Text, as_html, as_markdown, pictures
from benchmarks.reporting.sections import sections
from pipelines.files import write_atomically

TITLE = "How fast fastmoco is"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write a report on results, as Markdown and as one HTML file."""

    results: Annotated[Path, tyro.conf.Positional]
    """The --out of run_all.py or of a benchmark, or a file of committed results."""
    commit: str | None = None
    """Also store them in benchmarks/results under this name of the hardware, such as cpu-2core-xeon-amx."""


def main(settings: Settings, committed: Path = RESULTS) -> list[Path]:
    """Write the report and the files to commit; returns the pages. Raises ConfigError and DataError."""
    path = settings.results
    stem = path.with_suffix("") if path.is_file() else path / "report"
    written = write_report(read(path), stem)
    if settings.commit is not None:
        kept = keep(path, settings.commit, committed)
        written += [kept, *write_report(read(kept), kept.with_suffix(""), html=False)]
    return written


def write_report(collection: Collection, stem: Path, *, html: bool = True) -> list[Path]:
    """Write STEM.md with its pictures STEM-NAME.svg, and STEM.html."""
    blocks = compose(collection)
    for picture in pictures(blocks):
        write_atomically(stem.with_name(f"{stem.name}-{picture.name}.svg"), picture.svg)
    page = stem.with_name(f"{stem.name}.md")
    write_atomically(page, as_markdown(blocks, lambda name: f"{stem.name}-{name}.svg"))
    if not html:
        return [page]
    html_page = stem.with_name(f"{stem.name}.html")
    write_atomically(html_page, as_html(TITLE, blocks))
    return [page, html_page]


def compose(collection: Collection) -> list[Block]:
    """The page: machine, headlines, bottlenecks, tables and pictures, state of the parts, commands."""
    blocks: list[Block] = [Heading(TITLE, 1)]
    if collection.results:
        blocks.append(Text(_machine(collection.newest)))
    if collection.quick:
        blocks.append(Text("**Measured with --quick: a check that everything works, not a measurement of speed.**"))
    blocks.append(
        Text(
            "images/s are data set images, two views each. Medians, with quartiles in brackets; cases are interleaved, "
            "and ratios are taken within each round."
        )
    )
    if lines := headlines(collection):
        blocks += [Heading("Summary"), Bullets([str(line) for line in lines])]
    if limits := bottlenecks(collection):
        blocks += [Heading("Bottlenecks"), *map(Text, limits)]
    blocks += sections(collection)
    blocks += _parts(collection)
    return blocks


def _machine(environment: dict[str, Any]) -> str:
    """Hardware, versions, commit and date in one sentence."""
    gpu = f"{environment['gpu']}, driver {environment['driver']}; " if environment["gpu"] else ""
    names = ["torch", "torchvision", *(["cuda", "cudnn"] if gpu else []), "triton", "dali", "ffcv", "python"]
    versions = environment["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    return (
        f"{gpu}{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']} GiB; {libraries}; "
        f"commit {(environment['git_commit'] or 'unknown')[:7]}, {environment['date'][:10]}."
    )


def _parts(collection: Collection) -> list[Block]:
    """State of every part, and the commands that produced the results."""
    blocks: list[Block] = []
    ended = [part for part in collection.parts if part["part"] != "report"]
    if ended:
        rows = [(p["part"], p["state"], f"{p['seconds']:.0f}", f"{p['limit_s']:.0f}") for p in ended]
        blocks += [Heading("Parts"), Table(("part", "state", "s", "limit s"), rows)]
        for part in ended:
            if part.get("message"):
                kept = "".join(f"; kept {rounds}" for rounds in part.get("kept", []))
                blocks.append(Text(f"{part['part']}: {part['message']}{kept}"))
    commands = [result["environment"]["command"] for result in collection.results.values()]
    if commands:
        blocks += [Heading("Commands"), Code([f"uv run python {command}" for command in dict.fromkeys(commands)])]
    return blocks


def _main() -> None:
    for path in main(tyro.cli(Settings)):
        print(path)


if __name__ == "__main__":
    run_script(_main)
