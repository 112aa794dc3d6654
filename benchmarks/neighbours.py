"""CPU training beside other busy processes: the share of its rate that it keeps.

    uv run python benchmarks/neighbours.py --out DIR
    uv run python benchmarks/neighbours.py --quick

The default recipe's step, fed by each pipeline, beside 0, 1 and 2 processes in a busy loop, which this script starts.
Threads are `tuned` as in the trainer (`fastmoco.run.thread_count`) or `fixed` at torch's default; `passive` are fixed
threads that sleep at OpenMP barriers (OMP_WAIT_POLICY=PASSIVE). Each case is a separate process, because OpenMP reads
its settings only once. A reading is that of a run that starts now, including the search for the number of threads.
Cases and numbers of neighbours are interleaved, and ratios are within the same round: `of idle` to the same case
without neighbours, `vs fixed` to fixed threads with as many neighbours, `of idle, fixed` to fixed threads without.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.measure.end_to_end import Images
from benchmarks.measure.harness import (
    Reading,
    environment,
    parse_names,
    ratios,
    run_script,
    summarise,
    values_of,
)
from benchmarks.measure.sample_data import BETON, GENERATED, open_index
from benchmarks.measure.training_process import (
    ENVIRONMENT,
    FIXED,
    PASSIVE,
    TUNED,
    TrainingProcess,
    TrainingSettings,
)
from benchmarks.measure.turns import attempt, describe, save
from benchmarks.reporting.page import make_console, print_blocks
from benchmarks.reporting.sections import section
from fastmoco.errors import ConfigError
from pipelines.backends.select import PIPELINES, default_workers

SPIN = "while True: pass"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Training beside busy processes: the share of images/s that is kept, with tuned and with fixed threads."""

    data: str | None = None
    """A folder, list or named data set of small images. Unset: generated JPEGs."""
    pipelines: str = "resident,torch,ffcv"
    """Names of pipelines, separated by commas."""
    neighbours: str = "0,1,2"
    """Numbers of busy processes, separated by commas; 0 is always measured first."""
    threads: str = f"{TUNED},{FIXED},{PASSIVE}"
    """Kinds of threads, separated by commas; passive is measured with the first pipeline only."""
    batch_size: int = 32
    """Images per step."""
    width: float = 0.25
    """Factor on the channels of the ResNet-18."""
    workers: int = default_workers()
    """Processes or threads of every pipeline."""
    seconds: float = 8.0
    """Duration of a reading."""
    repetitions: int = 3
    """Number of interleaved rounds."""
    quick: bool = False
    """A narrow network, one pipeline and short readings, to check that everything works."""
    out: Path | None = None
    """Folder for the JSON file."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measure, print a table, write the result and return it. Raises ConfigError and DataError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, width=0.125, batch_size=8, seconds=0.2, repetitions=1)
        settings = replace(settings, pipelines="resident", neighbours="0,1", threads=f"{TUNED},{FIXED}")
    names = parse_names(settings.pipelines, tuple(PIPELINES), "--pipelines")
    kinds = parse_names(settings.threads, tuple(ENVIRONMENT), "--threads")
    counts = _counts(settings.neighbours)
    training = TrainingSettings(settings.batch_size, settings.width, settings.workers)
    left_out: dict[str, str] = {}
    result: dict[str, Any] = {
        "benchmark": "neighbours",
        "environment": environment(torch.device("cpu")),
        "settings": asdict(settings) | {"out": None},
        "task": asdict(training.task) | {"width": settings.width},
        "left_out": left_out,
    }
    path = None if settings.out is None else settings.out / "neighbours.json"
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch, ExitStack() as stack:
        index = open_index(settings.data, training.task.side, None, Path(scratch))
        images = Images(index, Path(scratch), settings.workers)
        processes: dict[tuple[str, str], TrainingProcess] = {}
        data = settings.data or str(Path(scratch) / GENERATED)
        for name in names:
            for kind in kinds:
                if kind == PASSIVE and name != names[0]:
                    continue

                def start(name: str = name, kind: str = kind) -> TrainingProcess:
                    stored = data if images.index_for(name) is index else str(Path(scratch) / BETON)
                    return TrainingProcess(name, kind, stored, training, settings.seconds)

                if (process := attempt(start, name, left_out)) is None:
                    break
                processes[name, kind] = stack.enter_context(process)
        cases = {f"{name} {kind}": process for (name, kind), process in processes.items()}
        readings: dict[tuple[str, int], list[Reading]] = {}
        for repetition in range(settings.repetitions):
            for case, count, reading in _round(cases, counts, left_out, backwards=repetition % 2 == 1):
                readings.setdefault((case, count), []).append(reading)
            cases = {case: process for case, process in cases.items() if case not in left_out}
            if not cases:
                raise ConfigError(f"no pipeline runs here: {describe(left_out)}")
            kept = [(name, kind) for name, kind in processes if f"{name} {kind}" in cases]
            of_kept = {key: values for key, values in readings.items() if key[0] in cases}
            result["rows"] = [_row(name, kind, count, of_kept) for name, kind in kept for count in counts]
            save(path, result, repetition + 1, settings.repetitions)
    print_blocks(console, section(result))
    return result


def _round(
    cases: dict[str, TrainingProcess], counts: list[int], left_out: dict[str, str], *, backwards: bool
) -> Iterator[tuple[str, int, Reading]]:
    """A reading of every case beside every number of neighbours; a case that fails is left out from then on."""
    order = list(reversed(cases)) if backwards else list(cases)
    for count in counts:
        with neighbours(count):
            for case in order:
                if case in left_out:
                    continue
                reading = attempt(cases[case].read, case, left_out)
                if reading is not None:
                    yield case, count, reading


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """`count` processes that keep a core busy each."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", SPIN])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def _counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.strip().isdecimal() and int(count) <= 64 for count in counts):
        raise ConfigError(f"--neighbours {text}: expected numbers from 0 to 64 separated by commas, such as 0,1,2")
    return sorted({0, *map(int, counts)})


def _row(name: str, kind: str, count: int, readings: dict[tuple[str, int], list[Reading]]) -> dict[str, Any]:
    """The result of one case with `count` neighbours."""

    def rates(kind: str, count: int) -> list[float]:
        return values_of(readings[f"{name} {kind}", count])

    compared = (f"{name} {FIXED}", 0) in readings
    return {
        "pipeline": name,
        "threads": kind,
        "neighbours": count,
        "images_per_s": summarise(rates(kind, count)),
        "used_threads": summarise(values_of(readings[f"{name} {kind}", count], "threads")),
        "kept": ratios(rates(kind, count), rates(kind, 0)),
        "to_fixed": ratios(rates(kind, count), rates(FIXED, count)) if compared else None,
        "to_idle_fixed": ratios(rates(kind, count), rates(FIXED, 0)) if compared else None,
    }


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
