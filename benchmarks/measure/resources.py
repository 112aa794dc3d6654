"""What a benchmark costs the machine: processor time and memory of all its processes, and memory of the GPU.

The process tree is this process and all that descend from it: a DataLoader's workers are children of a fork server.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def process_tree() -> list[int]:
    """This process and its descendants that live."""
    parents: dict[int, int] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            parents[int(entry.name)] = int(fields[1])
    tree = [os.getpid()]
    for pid in tree:  # grows while it is walked
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def cpu_seconds() -> float:
    """Processor time of the tree so far, user and system, with that of children which have ended and were waited for.

    In ticks of 10 ms: take the difference over a second or more.
    """
    total = 0
    for pid in process_tree():
        if (fields := _stat(pid)) is not None:
            total += sum(int(ticks) for ticks in fields[11:15])  # utime, stime, cutime, cstime
    return total / _TICKS_PER_S


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from `state` on; None for a process that has ended. Names may hold any character."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def memory_bytes() -> int:
    """Proportional set size of the tree: resident pages, each shared one counted once in all."""
    return sum(_kib(pid, "smaps_rollup", "Pss") for pid in process_tree()) * 1024


def resident_bytes() -> int:
    """Resident set size of this process."""
    return _kib(os.getpid(), "status", "VmRSS") * 1024


def peak_resident_bytes() -> int:
    """Its peak since `reset_peak_resident`, or since the process began."""
    return _kib(os.getpid(), "status", "VmHWM") * 1024


def reset_peak_resident() -> None:
    """Gives freed memory back to the system and starts the peak anew. Raises OSError where the kernel refuses."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others give memory back by themselves
    if trim is not None:
        trim(0)
    (_PROC / "self" / "clear_refs").write_text("5")


def _kib(pid: int, file: str, key: str) -> int:
    try:
        text = (_PROC / str(pid) / file).read_text(encoding="utf-8", errors="replace")
    except OSError:  # ended in the meantime
        return 0
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found.group(1)) if found else 0


@dataclass(frozen=True)
class NvmlDevice:
    """What the driver says about a GPU; `handle` is NVML's."""

    handle: Any
    driver: str
    power_limit_w: float | None
    max_sm_clock_mhz: int | None

    def used_bytes(self) -> int:
        """Memory of the GPU that is in use, by whatever process and library: also what torch cannot see."""
        import pynvml

        return int(pynvml.nvmlDeviceGetMemoryInfo(self.handle).used)


@cache
def nvml_device(device: torch.device) -> NvmlDevice | None:
    """None without a driver, or where NVML does not know the GPU that torch uses."""
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        driver = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    return NvmlDevice(
        handle,
        driver if isinstance(driver, str) else driver.decode(),
        _or_none(lambda: pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3),
        _or_none(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
    )


def _or_none(query: Any) -> Any:
    """A virtual GPU answers some queries only."""
    import pynvml

    try:
        return query()
    except pynvml.NVMLError:
        return None


def device_memory(device: torch.device) -> dict[str, float]:
    """Bytes in use now: torch's allocated and reserved, and NVML's for the whole GPU. Empty for a CPU."""
    if device.type != "cuda":
        return {}
    found: dict[str, float] = {
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "reserved_bytes": torch.cuda.memory_reserved(device),
    }
    if (nvml := nvml_device(device)) is not None:
        found["nvml_bytes"] = nvml.used_bytes()
    return found
