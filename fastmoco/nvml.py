"""What NVIDIA's driver says about the GPUs of this machine, whether torch can use them or not."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_nvml: Any = None
with suppress(ImportError):  # not installed where there are no NVIDIA GPUs
    import pynvml

    _nvml = pynvml

# Reasons for a reduced clock, of nvml.h; a GPU that has nothing to do, or an application's choice, is no problem.
_SLOW = {0x4: "power limit", 0x8: "hardware slowdown", 0x20: "temperature", 0x40: "temperature", 0x80: "power brake"}


def driver_version() -> str | None:
    """Version of the driver, or None without one."""
    if _nvml is None:
        return None
    try:
        _nvml.nvmlInit()
        version = _nvml.nvmlSystemGetDriverVersion()
    except _nvml.NVMLError:
        return None
    return version if isinstance(version, str) else version.decode()


def gpus_of_driver() -> list[str]:
    """Names of the GPUs that the driver lists."""
    if _nvml is None:
        return []
    try:
        _nvml.nvmlInit()
        count = _nvml.nvmlDeviceGetCount()
        names = [_nvml.nvmlDeviceGetName(_nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
    except _nvml.NVMLError:
        return []
    return [name if isinstance(name, str) else name.decode() for name in names]


def gpu_state(uuid: str) -> dict[str, Any]:
    """What the driver says about a GPU; virtual GPUs support some of it, a machine without the driver none."""
    if _nvml is None:
        return {}
    try:
        _nvml.nvmlInit()
        handle = _nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except _nvml.NVMLError:
        return {}
    queries: dict[str, Callable[[], Any]] = {
        "other_processes": lambda: len(_nvml.nvmlDeviceGetComputeRunningProcesses(handle)) - 1,
        "used_bytes": lambda: int(_nvml.nvmlDeviceGetMemoryInfo(handle).used),
        "utilisation_percent": lambda: int(_nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "power_limit_w": lambda: _nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3,
        "power_limit_default_w": lambda: _nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1e3,
        "temperature_c": lambda: _nvml.nvmlDeviceGetTemperature(handle, _nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": lambda: _nvml.nvmlDeviceGetClockInfo(handle, _nvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": lambda: _nvml.nvmlDeviceGetMaxClockInfo(handle, _nvml.NVML_CLOCK_SM),
        "slowed_by": lambda: _slowed_by(_nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        "ecc": lambda: bool(_nvml.nvmlDeviceGetEccMode(handle)[0]),
        "mig": lambda: bool(_nvml.nvmlDeviceGetMigMode(handle)[0]),
        "pcie_generation": lambda: _nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
        "pcie_width": lambda: _nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
        "pcie_max_width": lambda: _nvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
    }
    state = {}
    for name, query in queries.items():
        with suppress(_nvml.NVMLError):
            state[name] = query()
    if "pcie_generation" in state and "pcie_width" in state:
        state["pcie"] = f"PCIe {state['pcie_generation']} ×{state['pcie_width']}"
    return state


class PowerMeter:
    """Mean power of a GPU between two readings, from the energy counter of the driver: a host call of microseconds.

    The driver measures the whole board, so other processes on it count too.
    """

    def __init__(self, uuid: str, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._handle, self._last = now, None, None
        if _nvml is not None:
            with suppress(_nvml.NVMLError):
                _nvml.nvmlInit()
                self._handle = _nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
                self.read_w()

    def read_w(self) -> float | None:
        """Watts since the last reading; None where the driver does not measure energy, as on virtual GPUs."""
        if self._handle is None:
            return None
        try:
            reading = (_nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3, self._now())
        except _nvml.NVMLError:
            self._handle = None
            return None
        last, self._last = self._last, reading
        return None if last is None or reading[1] <= last[1] else (reading[0] - last[0]) / (reading[1] - last[1])


def _slowed_by(reasons: int) -> list[str]:
    return sorted({name for bit, name in _SLOW.items() if reasons & bit})
