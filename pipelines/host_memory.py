"""Memory of the host that can be allocated now, and the limits of the container that this process runs in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from pipelines.platforms import free_host_memory_bytes

_V2 = ("memory.max", "memory.current", "inactive_file")
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


def container_limits(root: str = "/") -> list[Limit]:
    """Limits of the control groups, version 1 or 2, that this process is in, and of their parents.

    In a container the path of a group is often that on the host, and the group itself is mounted at the root.
    """
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[Limit] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files, mount = _V2, Path(root, "sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            files, mount = _V1, Path(root, "sys/fs/cgroup/memory")
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            found += _limit(folder, *files)
            if folder == mount:
                break
    return found


def _limit(folder: Path, limit: str, usage: str, cache: str) -> list[Limit]:
    """The limit of one control group; none if it is not here or has none ("max")."""
    try:
        used, most = int((folder / usage).read_text()), int((folder / limit).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [] if most >= _UNLIMITED else [Limit(most, max(0, used - int(statistics.get(cache, 0))))]
