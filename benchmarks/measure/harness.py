"""How every benchmark measures: cases take turns, every value is kept, and the file says what it was measured on.

readings = take_turns({"plain": plain, "ours": ours}, repetitions=5)
summaries = {name: summarise([r["images_per_s"] for r in rs]) for name, rs in readings.items()}
write_json(out / "step.json", {"environment": environment(device), ...})
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.measure.resources import nvml_device
from fastmoco.errors import ConfigError, exit_code
from fastmoco.files import write_atomically
from fastmoco.run.environment import git_commit, versions

Reading = dict[str, float]
_DALI, _FFCV = ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), ("ffcv",)
_TRITON = ("triton", "pytorch-triton")


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of the values of one case, in the order in which they were taken."""

    median: float
    lower_quartile: float
    upper_quartile: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.lower_quartile)}–{short(self.upper_quartile)})"


def summarise(values: Sequence[float]) -> Summary:
    """Quartiles interpolate between the values, as `numpy.quantile` does; of one value all three are that value."""
    assert values, "nothing was measured"
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], tuple(values))
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, lower, upper, tuple(values))


def ratios(values: Sequence[float], control: Sequence[float]) -> Summary:
    """Of each value to the baseline's value of the same round: what slows a whole round down cancels out."""
    return summarise([value / base for value, base in zip(values, control, strict=True)])


def take_turns(cases: Mapping[str, Callable[[], Reading]], repetitions: int) -> dict[str, list[Reading]]:
    """Every case once a round, in alternating direction, so that noise and drift hit all of them alike.

    A case warms itself up, measures once and returns what it measured.
    """
    readings: dict[str, list[Reading]] = {name: [] for name in cases}
    for repetition in range(repetitions):
        names = list(cases)
        for name in names if repetition % 2 == 0 else reversed(names):
            readings[name].append(cases[name]())
    return readings


class Stopwatch:
    """Seconds between `start` and `stop`: CUDA events and a final synchronise, or a monotonic clock elsewhere.

    `start` waits until the device has nothing left to do, so that nothing earlier is counted.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._began: float | torch.cuda.Event = 0.0

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._began = _recorded_event()
        else:
            self._began = self._clock()

    def stop(self) -> float:
        if isinstance(self._began, torch.cuda.Event):
            ended = _recorded_event()
            torch.cuda.synchronize(self._device)
            return self._began.elapsed_time(ended) / 1e3
        return self._clock() - self._began


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_per_call(call: Callable[[], object], calls: int, device: torch.device, warm_up: int = 1) -> float:
    """Mean over `calls` calls in a row, after `warm_up` others."""
    for _ in range(warm_up):
        call()
    watch = Stopwatch(device)
    watch.start()
    for _ in range(calls):
        call()
    return watch.stop() / calls


def chosen(words: str, known: Sequence[str], flag: str) -> list[str]:
    """The names in a flag's value, which commas separate, each once. Raises ConfigError for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in words.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag} {name} is unknown: expected some of {','.join(known)}")
    if not names:
        raise ConfigError(f"{flag} is empty: name some of {','.join(known)}")
    return names


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: hardware, driver, versions, commit, command, date, and how busy the machine was."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "device": str(device),
        "gpu": None,
        "driver": None,
        "versions": versions() | {"triton": _version(_TRITON), "dali": _version(_DALI), "ffcv": _version(_FFCV)},
        "git_commit": git_commit(),
        "command": shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        if (nvml := nvml_device(device)) is not None:
            found["driver"] = nvml.driver
            found["gpu_power_limit_w"] = nvml.power_limit_w
            found["gpu_max_sm_clock_mhz"] = nvml.max_sm_clock_mhz
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(names: Sequence[str]) -> str | None:
    """Of the first of these packages that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """A result file, whole or absent; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=2, default=_plain, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Summary):
        return asdict(value)
    raise TypeError(f"{type(value)} has no place in a result file")


def make_console() -> Console:
    """Standard output; off a terminal it is as wide as the tables, because a log is read at any width."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 150)


def show(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """A table: names to the left, numbers to the right."""
    table = Table(title=Text(title, "bold"), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    if note:
        console.print(Text(note, "dim"), soft_wrap=True)


def short(value: float) -> str:
    """Three digits that matter, thousands set apart: 0.0123, 1.23, 12.3, 1,230."""
    magnitude = abs(value)
    if not 0.1 <= magnitude < float("inf"):
        return f"{value:.3g}"
    digits = sum(magnitude < limit for limit in (1, 10, 100))
    return f"{value:,.{digits}f}"


def run_script(script: Callable[[], object]) -> NoReturn:
    """Runs it and exits; an error that people can do something about is one line and its exit code."""
    try:
        script()
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(code)
    sys.exit(0)
