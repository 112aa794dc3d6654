"""Power, energy, utilisation and memory of a GPU, sampled through NVML in a background thread.

with Sampler(nvml_query(nvml)) as sampler:
    train()
joules = sampler.reading()["joules"]
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType
from typing import NamedTuple

import pynvml

from benchmarks.measure.harness import Reading
from benchmarks.measure.resources import NvmlDevice

PERIOD_S = 0.1  # NVML updates power every 20 to 100 ms and utilisation every 1/6 to 1 s


class Sample(NamedTuple):
    """State of a GPU at one time; None for what NVML does not report, as on virtual GPUs.

    energy_j             since the driver was loaded
    utilisation_percent  share of the driver's last period in which any kernel ran: 100 means busy, not efficient
    """

    at_s: float
    power_w: float | None = None
    energy_j: float | None = None
    utilisation_percent: float | None = None
    used_bytes: float | None = None


def nvml_query(nvml: NvmlDevice) -> Callable[[], Sample]:
    """A function that takes a sample, which needs a few milliseconds and releases the interpreter lock."""

    def sample() -> Sample:
        power_mw = nvml.query(pynvml.nvmlDeviceGetPowerUsage)
        energy_mj = nvml.query(pynvml.nvmlDeviceGetTotalEnergyConsumption)
        rates, memory = nvml.query(pynvml.nvmlDeviceGetUtilizationRates), nvml.query(pynvml.nvmlDeviceGetMemoryInfo)
        return Sample(
            time.perf_counter(),
            None if power_mw is None else power_mw / 1e3,
            None if energy_mj is None else energy_mj / 1e3,
            None if rates is None else float(rates.gpu),
            None if memory is None else float(memory.used),
        )

    return sample


class Sampler:
    """Takes a sample on entry, in every period, and on exit, where an error of the query is raised."""

    def __init__(self, query: Callable[[], Sample], period_s: float = PERIOD_S) -> None:
        self.samples: list[Sample] = []
        self._query, self._period_s = query, period_s
        self._stop, self._error = threading.Event(), None
        self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self.samples.append(self._query())
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._period_s):
                self.samples.append(self._query())
        except Exception as error:
            self._error = error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error
        self.samples.append(self._query())

    def reading(self) -> Reading:
        return read_samples(self.samples)


def read_samples(samples: Sequence[Sample]) -> Reading:
    """Summary from the first sample to the last, without what NVML did not report.

    joules                   from the driver's energy counter, or else the integral of power
    power_w                  mean: joules over seconds
    gpu_utilisation_percent  mean of the samples
    nvml_used_bytes          maximum of the samples
    """
    reading: Reading = {}
    elapsed_s = samples[-1].at_s - samples[0].at_s
    joules = _joules(samples)
    if joules is not None and elapsed_s > 0:
        reading |= {"joules": joules, "power_w": joules / elapsed_s}
    utilisation = [s.utilisation_percent for s in samples if s.utilisation_percent is not None]
    if utilisation:
        reading["gpu_utilisation_percent"] = sum(utilisation) / len(utilisation)
    used = [s.used_bytes for s in samples if s.used_bytes is not None]
    if used:
        reading["nvml_used_bytes"] = max(used)
    return reading


def _joules(samples: Sequence[Sample]) -> float | None:
    first, last = samples[0].energy_j, samples[-1].energy_j
    if first is not None and last is not None:
        return last - first
    known = [(s.at_s, s.power_w) for s in samples if s.power_w is not None]
    if len(known) < 2:
        return None
    return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(known))
