"""Summaries of readings, timing, the environment, and result files.

summaries = {name: summarise_all(of_case) for name, of_case in readings.items()}
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

import psutil
import torch

from benchmarks.measure.resources import memory_sources, nvml_device
from fastmoco.errors import ConfigError, exit_code
from fastmoco.run.environment import git_commit, versions
from pipelines.files import write_atomically
from pipelines.platforms import processor_name

Reading = dict[str, float]
_DALI, _FFCV = ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), ("ffcv",)
_TRITON = ("triton", "pytorch-triton")
_DEPTH_OF_A_CASE = 3  # the readings of a case, each a summary with a list of values


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of one case's values, which are kept in the order of measurement."""

    median: float
    lower_quartile: float
    upper_quartile: float
    values: tuple[float, ...]


def summarise(values: Sequence[float]) -> Summary:
    """Quartiles are interpolated as in `numpy.quantile`; a single value is its own median and quartiles."""
    assert values, "nothing was measured"
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], tuple(values))
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, lower, upper, tuple(values))


def values_of(readings: Sequence[Reading], key: str = "images_per_s") -> list[float]:
    """One quantity of every reading of a case."""
    return [reading[key] for reading in readings]


def summarise_all(readings: Sequence[Reading]) -> dict[str, Any]:
    """A summary of every quantity of a case that all readings have."""
    keys = (key for key in readings[0] if all(key in reading for reading in readings))
    return {key: summarise(values_of(readings, key)) for key in keys}


def ratios(values: Sequence[float], baseline: Sequence[float]) -> Summary:
    """Ratio of each value to the baseline's in the same round: what slows down a whole round cancels out."""
    return summarise([value / base for value, base in zip(values, baseline, strict=True)])


class Stopwatch:
    """Seconds between `start` and `stop`: CUDA events with a final synchronise, or a monotonic clock elsewhere.

    `start` synchronises first, so that earlier work is not counted.
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
    """Mean over `calls` consecutive calls, after `warm_up` others."""
    for _ in range(warm_up):
        call()
    watch = Stopwatch(device)
    watch.start()
    for _ in range(calls):
        call()
    return watch.stop() / calls


def parse_names(text: str, known: Sequence[str], flag: str) -> list[str]:
    """The names in a comma-separated flag, without duplicates. Raises ConfigError for an unknown one or for none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise ConfigError(f"{flag} {name} is unknown: expected some of {','.join(known)}")
    if not names:
        raise ConfigError(f"{flag} is empty: name some of {','.join(known)}")
    return names


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, driver, versions, commit, command, date and load: what the results depend on."""
    described: dict[str, Any] = {
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "device": str(device),
        "memory_from": memory_sources(device),
        "gpu": None,
        "driver": None,
        "versions": versions() | {"triton": _version(_TRITON), "dali": _version(_DALI), "ffcv": _version(_FFCV)},
        "git_commit": git_commit(),
        "command": shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        if (nvml := nvml_device(device)) is not None:
            described["driver"] = nvml.driver
            described["gpu_power_limit_w"] = nvml.power_limit_w
            described["gpu_max_sm_clock_mhz"] = nvml.max_sm_clock_mhz
    return described


def _version(names: Sequence[str]) -> str | None:
    """Version of the first of these packages that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file atomically, one line per case or reading; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _format(as_json(result)) + "\n")


def as_json(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as it is read back from its file: summaries as dicts, keys as strings."""
    return json.loads(json.dumps(result, default=_encode))


def _encode(value: Any) -> Any:
    if isinstance(value, Summary):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be written to a result file")


def _format(value: Any, indent: str = "") -> str:
    """JSON text: the outermost dict, lists of dicts and what is nested deeper than a case are split over lines."""
    is_rows = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if not value or (indent and not is_rows and _depth(value) <= _DEPTH_OF_A_CASE):
        return json.dumps(value, ensure_ascii=False)
    inner = indent + "  "
    if isinstance(value, dict):
        lines = [f"{json.dumps(key, ensure_ascii=False)}: {_format(item, inner)}" for key, item in value.items()]
    else:
        lines = [_format(item, inner) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{closing}"


def _depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def short(value: float) -> str:
    """Three significant digits with thousands separators: 0.0123, 1.23, 12.3, 1,230."""
    magnitude = abs(value)
    if not 0.1 <= magnitude < float("inf"):
        return f"{value:.3g}"
    digits = sum(magnitude < limit for limit in (1, 10, 100))
    return f"{value:,.{digits}f}"


def run_script(script: Callable[[], object]) -> NoReturn:
    """Run a script's main function and exit. An error that the user can fix is one line and its exit code."""
    try:
        script()
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(code)
    sys.exit(0)
