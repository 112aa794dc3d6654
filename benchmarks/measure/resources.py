"""CPU time and memory of the process tree, and memory of the GPU.

The process tree is this process and all its descendants: a DataLoader's workers are children of a fork server.
Some sandboxes lack /proc/PID/smaps_rollup or NVML; `memory_sources` says what the figures are taken from instead.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import pynvml
import torch

from pipelines import host_memory


def process_tree() -> list[psutil.Process]:
    """This process and its descendants."""
    current = psutil.Process()
    return [current, *current.children(recursive=True)]


def cpu_seconds() -> float:
    """User and system time of the tree so far, including children that have ended and were waited for.

    The kernel counts in ticks of 10 ms: take differences over a second or more.
    """
    total = 0.0
    for process in process_tree():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_bytes() -> int:
    """Memory of the tree, with a page that is shared between processes counted once in total.

    The sum of proportional set sizes. Where the kernel does not report them: all resident pages of this process, and
    those of its descendants that are not shared.
    """
    current, *others = process_tree()
    proportional = _proportional_bytes(current)
    total = proportional or current.memory_info().rss
    for process in others:
        with suppress(psutil.Error):  # it has ended
            total += _proportional_bytes(process) if proportional else _private_bytes(process)
    return total


def _proportional_bytes(process: psutil.Process) -> int:
    """Proportional set size; 0 where the kernel does not report it. Raises psutil.NoSuchProcess."""
    try:
        return getattr(process.memory_full_info(), "pss", 0)
    except psutil.NoSuchProcess:
        raise
    except (psutil.Error, OSError):
        return 0


def _private_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def memory_sources(device: torch.device) -> dict[str, str]:
    """What `memory_bytes` and `used_bytes` are taken from here."""
    sources = {"host": "proportional set size" if _proportional_bytes(psutil.Process()) else "resident set size"}
    if device.type == "cuda":
        sources["device"] = "cudaMemGetInfo" if _nvml_used_bytes(device) is None else "NVML"
    return sources


def resident_bytes() -> int:
    """Resident set size of this process."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Peak resident set size since `reset_peak_resident`, or since the process started; else the size now."""
    return max(host_memory.peak_resident_bytes() or 0, resident_bytes())


def release_caches(device: torch.device) -> None:
    """Free what is only kept for reuse, on the host and on the device, and reset both peaks."""
    gc.collect()
    _release_dali()
    with suppress(OSError):  # refused in some sandboxes: the peak is then that of the whole process so far
        host_memory.reset_peak_resident()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _release_dali() -> None:
    """Free what DALI keeps of pipelines that are gone: it has a pool of its own, on the device and of pinned memory."""
    backend = sys.modules.get("nvidia.dali.backend")  # not imported for this
    release = getattr(backend, "ReleaseUnusedMemory", None)  # of DALI 1.18 and later
    if release is not None:
        with suppress(RuntimeError):  # without a device
            release()


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Differences, never negative: garbage from earlier may have been collected in between."""
    return {key: max(0.0, after[key] - before[key]) for key in before if key in after}


@dataclass(frozen=True)
class NvmlDevice:
    """A GPU as the driver sees it; `handle` is NVML's."""

    handle: Any
    driver: str

    @property
    def power_limit_w(self) -> float | None:
        limit_mw = self.query(pynvml.nvmlDeviceGetPowerManagementLimit)
        return None if limit_mw is None else limit_mw / 1e3

    @property
    def max_sm_clock_mhz(self) -> int | None:
        return self.query(lambda handle: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM))

    def used_bytes(self) -> int | None:
        memory = self.query(pynvml.nvmlDeviceGetMemoryInfo)
        return None if memory is None else int(memory.used)

    def query(self, function: Callable[[Any], Any]) -> Any:
        """The result of an NVML function, or None: virtual GPUs support only some of them."""
        try:
            return function(self.handle)
        except pynvml.NVMLError:
            return None


@cache
def nvml_device(device: torch.device) -> NvmlDevice | None:
    """None on a CPU, without a driver, and for a GPU that NVML does not list."""
    if device.type != "cuda":
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        driver = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    return NvmlDevice(handle, driver if isinstance(driver, str) else driver.decode())


def used_bytes(device: torch.device) -> int:
    """Memory of a GPU in use by all processes and libraries, including what torch cannot see."""
    if (used := _nvml_used_bytes(device)) is not None:
        return used
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _nvml_used_bytes(device: torch.device) -> int | None:
    nvml = nvml_device(device)
    return None if nvml is None else nvml.used_bytes()


def device_memory(device: torch.device) -> dict[str, float]:
    """Bytes in use: torch's allocated and reserved, and `used_bytes` as `nvml_bytes`. Empty on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "reserved_bytes": torch.cuda.memory_reserved(device),
        "nvml_bytes": used_bytes(device),
    }
