"""Memory of the host that can be allocated now, and the limits of the container that this process runs in."""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path
from typing import NamedTuple

from pipelines.cgroups import group_folders
from pipelines.platforms import free_host_memory_bytes

_V2 = ("memory.max", "memory.current", "inactive_file")
_V2_THROTTLED = ("memory.high", *_V2[1:])  # above it a process is slowed down until it hardly runs
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_UNLIMITED = 2**60  # version 1 writes the largest number of pages for no limit


class Limit(NamedTuple):
    """Limit of a control group in bytes, and what it uses, without file caches that can be dropped."""

    limit: int
    used: int

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)


def available_bytes() -> int:
    """What can be allocated: of the host, or of the container if that has less."""
    return int(min(on_host_bytes(), in_container_bytes()))


def on_host_bytes(path: str = "/proc/meminfo") -> int:
    """What Linux estimates to be available, with caches that it would drop; elsewhere what is free."""
    try:
        return meminfo(path)["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return free_host_memory_bytes()


def in_container_bytes(root: str = "/") -> float:
    """What the control groups of this process leave of their limits; inf without one."""
    return min((limit.left for limit in container_limits(root)), default=math.inf)


def meminfo(path: str = "/proc/meminfo") -> dict[str, int]:
    """Linux's figures in bytes. Raises OSError elsewhere."""
    fields = dict(line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    return {name: 1024 * int(value.split()[0]) for name, value in fields.items() if value.split()[-1:] == ["kB"]}


def peak_resident_bytes() -> int | None:
    """Peak resident set size since `reset_peak_resident`, or since the process started; None where nothing tells it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(peak[1]) if peak else None


def reset_peak_resident() -> None:
    """Return freed memory to the system and reset the peak. Raises OSError if the kernel refuses."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other allocators return memory themselves
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def container_limits(root: str = "/") -> list[Limit]:
    """Limits of the control groups, version 1 or 2, that this process is in, and of their parents."""
    first, second = group_folders("memory", root)
    limits = [limit for folder in first for limit in _limit(folder, *_V1)]
    for files in (_V2, _V2_THROTTLED):
        limits += [limit for folder in second for limit in _limit(folder, *files)]
    return limits


def _limit(folder: Path, limit: str, usage: str, cache: str) -> list[Limit]:
    """The limit of one control group; none if it is not here or has none ("max")."""
    try:
        used, most = int((folder / usage).read_text()), int((folder / limit).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [] if most >= _UNLIMITED else [Limit(most, max(0, used - int(statistics.get(cache, 0))))]
