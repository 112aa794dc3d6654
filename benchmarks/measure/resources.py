"""CPU time and memory of the process tree, and memory of the GPU.

The process tree is this process and all its descendants: a DataLoader's workers are children of a fork server.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch


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
    """Proportional set size of the tree: a page shared between processes is counted once in total."""
    total = 0
    for process in process_tree():
        with suppress(psutil.Error):  # it has ended
            total += process.memory_full_info().pss
    return total


def resident_bytes() -> int:
    """Resident set size of this process."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Peak resident set size since `reset_peak_resident`, or since the process started. psutil does not report it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(peak[1]) if peak else 0


def reset_peak_resident() -> None:
    """Return freed memory to the system and reset the peak. Raises OSError if the kernel refuses."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other allocators return memory themselves
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def release_caches(device: torch.device) -> None:
    """Free what is only kept for reuse, on the host and on the device, and reset both peaks."""
    gc.collect()
    with suppress(OSError):  # refused in some sandboxes: the peak is then that of the whole process so far
        reset_peak_resident()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


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

    def used_bytes(self) -> int:
        """Memory in use by all processes and libraries, including what torch cannot see."""
        return int(pynvml.nvmlDeviceGetMemoryInfo(self.handle).used)

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


def device_memory(device: torch.device) -> dict[str, float]:
    """Bytes in use: torch's allocated and reserved, and NVML's for the whole GPU. Empty on a CPU."""
    if device.type != "cuda":
        return {}
    memory: dict[str, float] = {
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "reserved_bytes": torch.cuda.memory_reserved(device),
    }
    if (nvml := nvml_device(device)) is not None:
        memory["nvml_bytes"] = nvml.used_bytes()
    return memory
