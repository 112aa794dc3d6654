"""How much of its rate training keeps on a CPU where other processes have something to do, too.

    uv run python benchmarks/neighbours.py --out benchmarks/results
    uv run python benchmarks/neighbours.py --quick

The default recipe's step, fed by each pipeline, beside 0, 1 and 2 processes that do nothing but spin, which this script
starts itself. Threads are `tuned` as the trainer tunes them (`fastmoco.run.thread_count`) or `fixed` at torch's own
number; `passive` are fixed ones that OpenMP lets sleep at its barriers (OMP_WAIT_POLICY=PASSIVE). Each case is a
process of its own, because OpenMP reads its settings once. A reading is what a run would see that starts now: the
search for the number of threads is in it. Cases and numbers of neighbours take turns, and ratios are to readings of the
same round: `kept` to the same case without neighbours, `to fixed` to fixed threads beside as many, `of fixed, idle`
beside none.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder, whose pipelines.py hides the package

import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.measure.end_to_end import Images, open_case, our_engine
from benchmarks.measure.harness import (
    Reading,
    chosen,
    environment,
    make_console,
    ratios,
    run_script,
    show,
    summarise,
    write_json,
)
from benchmarks.measure.ladder import CONFIGS
from benchmarks.measure.plain import Task
from benchmarks.measure.sample_data import BETON, DRAWN, open_index
from fastmoco.config import RunConfig
from fastmoco.device import DTYPES
from fastmoco.errors import ConfigError, RankLostError
from fastmoco.recipes import recipe
from fastmoco.run.malloc import keep_freed_memory
from fastmoco.run.resolve import resolve
from fastmoco.run.thread_count import ThreadCount
from pipelines.backends.select import PIPELINES, default_workers
from pipelines.errors import BackendMissingError, DataError

TUNED, FIXED, PASSIVE = "tuned", "fixed", "passive"
ENVIRONMENT = {TUNED: {}, FIXED: {}, PASSIVE: {"OMP_WAIT_POLICY": "PASSIVE"}}
WARM_UP = 3  # steps before a case says that it is ready
TIMEOUT_S = 240.0  # for a case to open, or beyond what a reading is to take
SPIN = "while True: pass"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Training beside busy processes: images/s that are kept, with threads that are tuned and that are not."""

    data: str | None = None
    """A folder, list or named data set of small images. Unset: JPEGs drawn for the occasion."""
    pipelines: str = "resident,torch,ffcv"
    """Which, separated by commas."""
    neighbours: str = "0,1,2"
    """How many busy processes, separated by commas; without any comes first."""
    threads: str = f"{TUNED},{FIXED},{PASSIVE}"
    """Which kinds of threads, separated by commas; passive is for the first pipeline only."""
    batch_size: int = 32
    """Images a step."""
    width: float = 0.25
    """Factor on the channels of the ResNet-18."""
    workers: int = default_workers()
    """Processes or threads of every pipeline."""
    seconds: float = 8.0
    """How long each reading takes."""
    repetitions: int = 3
    """Rounds in which everything has its turn."""
    quick: bool = False
    """A narrow network, short readings, one pipeline: whether it works, not how fast it is."""
    out: Path | None = None
    """Folder for the JSON file."""


def main(settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Measures, prints a table and returns what it writes. Raises ConfigError, DataError and RankLostError."""
    console = console or make_console()
    if settings.quick:
        settings = replace(settings, width=0.125, batch_size=8, seconds=0.2, repetitions=1)
        settings = replace(settings, pipelines="resident", neighbours="0,1", threads=f"{TUNED},{FIXED}")
    names = chosen(settings.pipelines, tuple(PIPELINES), "--pipelines")
    kinds = chosen(settings.threads, tuple(ENVIRONMENT), "--threads")
    counts = _counts(settings.neighbours)
    result: dict[str, Any] = {"benchmark": "neighbours", "environment": environment(torch.device("cpu"))}
    with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch, ExitStack() as stack:
        index = open_index(settings.data, CONFIGS["cifar"].side, None, Path(scratch))
        images, processes, left_out = Images(index, Path(scratch), settings.workers), {}, {}
        data = settings.data or str(Path(scratch) / DRAWN)
        for name in names:
            for kind in kinds:
                if kind == PASSIVE and name != names[0]:
                    continue
                try:
                    stored = data if images.of(name) is index else str(Path(scratch) / BETON)
                    process = TrainingProcess(name, kind, stored, settings)
                    processes[name, kind] = stack.enter_context(process)
                except (BackendMissingError, DataError) as error:
                    left_out[name] = str(error)
        if not processes:
            raise ConfigError(f"no pipeline runs here: {'; '.join(left_out.values())}")
        cases = {f"{name} {kind}": process for (name, kind), process in processes.items()}
        readings: dict[tuple[str, int], list[Reading]] = {}
        for repetition in range(settings.repetitions):
            turns = list(cases) if repetition % 2 == 0 else list(reversed(cases))
            for count in counts:
                with neighbours(count):
                    for case in turns:
                        readings.setdefault((case, count), []).append(cases[case].read())
    rows = [_row(name, kind, count, readings) for name, kind in processes for count in counts]
    task = asdict(_task(settings)) | {"width": settings.width}
    result |= {"settings": asdict(settings) | {"out": None}, "task": task, "rows": rows, "left_out": left_out}
    _show(console, result)
    if settings.out is not None:
        write_json(settings.out / "neighbours.json", result)
    return result


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that keep a core busy."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", SPIN])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


class TrainingProcess:
    """A process that trains when it is asked to, and sleeps in between. Raises what kept it from opening."""

    def __init__(self, pipeline: str, kind: str, data: str, settings: Settings) -> None:
        self.name, self._seconds = f"{pipeline} {kind}", settings.seconds
        context = multiprocessing.get_context("spawn")
        self._end, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(theirs, pipeline, kind, data, settings))
        before = dict(os.environ)
        try:
            os.environ.update(ENVIRONMENT[kind])
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        try:
            self._answer(TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise

    def read(self) -> Reading:
        """How fast it trains now, and with how many threads in the end. Raises RankLostError where it has died."""
        with suppress(OSError):  # it is gone, as its answer will say
            self._end.send(self._seconds)
        return self._answer(self._seconds + TIMEOUT_S)

    def _answer(self, timeout_s: float) -> Any:
        try:
            answer = self._end.recv() if self._end.poll(timeout_s) else None
        except (EOFError, OSError):
            answer = None
        if answer is None:
            raise RankLostError(f"the process of {self.name} has died or has not answered for {timeout_s:g} s")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> TrainingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._end.send(None)
        self._process.join(5)
        self._process.kill()
        self._process.join()
        self._end.close()


def _train(end: Connection, pipeline: str, kind: str, data: str, settings: Settings) -> None:
    """In a process of its own: says when it is ready, then trains for as many seconds as it is asked to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks is interrupted, and closes the pipe
    device, task = torch.device("cpu"), _task(settings)
    try:
        with tempfile.TemporaryDirectory(prefix="fastmoco-bench-") as scratch, ExitStack() as stack:
            images = Images(open_index(data, task.side, None, Path(scratch)), Path(scratch), settings.workers)
            config, _ = resolve(_run_config(settings, data), images.index, device)
            engine = our_engine(config, task, images.index, device)
            dtype = DTYPES[config.run.amp]
            case = open_case(pipeline, images, task, device, dtype, settings.workers, engine)
            stack.callback(case.close)
            keep_freed_memory()
            batches = case.batches()
            for _ in range(WARM_UP):
                engine.step(next(batches))
            end.send("ready")
            while (seconds := end.recv()) is not None:
                count = ThreadCount(torch.get_num_threads()) if kind == TUNED else None
                steps, began = 0, time.perf_counter()
                for views in batches if count is None else count.steps(batches):
                    engine.step(views)
                    steps += 1
                    if time.perf_counter() - began >= seconds:
                        break
                elapsed_s = time.perf_counter() - began
                threads = torch.get_num_threads() if count is None else count.threads
                if count is not None:
                    count.close()
                end.send({"images_per_s": steps * task.batch_size / elapsed_s, "threads": float(threads)})
    except EOFError:  # nobody asks any more
        return
    except Exception as error:
        with suppress(OSError):
            end.send(error)


def _task(settings: Settings) -> Task:
    batch = settings.batch_size
    return replace(CONFIGS["cifar"], batch_size=batch, queue=32 * batch, bn_splits=2)


def _run_config(settings: Settings, data: str) -> RunConfig:
    """The default recipe on these images."""
    task = _task(settings)
    return recipe("shapes").replace(
        data=data,
        pipeline="torch",
        workers=settings.workers,
        width=settings.width,
        stem=task.stem,
        crop_size=task.side,
        batch_size=task.batch_size,
        moco_k=task.queue,
        bn_splits=task.bn_splits,
        allow_large_queue=True,  # a queue's cost does not depend on what is in it
    )


def _counts(words: str) -> list[int]:
    parts = words.split(",")
    if not all(part.strip().isdecimal() and int(part) <= 64 for part in parts):
        raise ConfigError(f"--neighbours {words}: expected numbers from 0 to 64 separated by commas, such as 0,1,2")
    return sorted({0, *map(int, parts)})


def _row(name: str, kind: str, count: int, readings: dict[tuple[str, int], list[Reading]]) -> dict[str, Any]:
    """Of one case beside so many neighbours."""

    def rates(kind: str, count: int) -> list[float]:
        return [reading["images_per_s"] for reading in readings[f"{name} {kind}", count]]

    compared = (f"{name} {FIXED}", 0) in readings
    return {
        "pipeline": name,
        "threads": kind,
        "neighbours": count,
        "images_per_s": summarise(rates(kind, count)),
        "used_threads": summarise([reading["threads"] for reading in readings[f"{name} {kind}", count]]),
        "kept": ratios(rates(kind, count), rates(kind, 0)),
        "to_fixed": ratios(rates(kind, count), rates(FIXED, count)) if compared else None,
        "to_idle_fixed": ratios(rates(kind, count), rates(FIXED, 0)) if compared else None,
    }


def _show(console: Console, result: dict[str, Any]) -> None:
    rows = []
    for row in result["rows"]:
        to_fixed, to_idle = row["to_fixed"], row["to_idle_fixed"]
        rows.append(
            (
                f"{row['pipeline']}, {row['threads']}",
                str(row["neighbours"]),
                str(row["images_per_s"]),
                f"{row['used_threads'].median:g}",
                f"{row['kept'].median:.0%}",
                "–" if to_fixed is None else f"{to_fixed.median:.2f}×",
                "–" if to_idle is None else f"{to_idle.median:.0%}",
            )
        )
    columns = ("pipeline, threads", "neighbours", "images/s", "threads", "kept", "to fixed", "of fixed, idle")
    task, settings = result["task"], result["settings"]
    note = "".join(f"{name}: {reason}\n" for name, reason in result["left_out"].items()).rstrip()
    sizes = f"{task['arch']} of width {task['width']:g}, {task['side']} px, batch {task['batch_size']}"
    show(console, f"training beside busy processes, {sizes}, {settings['workers']} workers", columns, rows, note)


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Settings)))
