"""Control groups of Linux, versions 1 and 2, that this process is in: what a container or a scheduler limits it to."""

from __future__ import annotations

import math
from pathlib import Path


def group_folders(controller: str, root: str = "/") -> tuple[list[Path], list[Path]]:
    """Folders of the groups of this process and of their parents: (of version 1 with this controller, of version 2).

    In a container the path of a group is often that on the host, and the group itself is mounted at the root.
    """
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [], []
    first: list[Path] = []
    second: list[Path] = []
    mounts = Path(root, "sys/fs/cgroup")
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            second += _with_parents(mounts, path)
        elif controller in controllers.split(","):
            mount = mounts / controller
            first += _with_parents(mount if mount.is_dir() else mounts / controllers, path)
    return first, second


def cpu_quota(root: str = "/") -> float:
    """Processors that the tightest group grants; inf without a limit."""
    first, second = group_folders("cpu", root)
    quotas = [_quota(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us") for folder in first]
    quotas += [_quota(folder, "cpu.max") for folder in second]
    return min(quotas, default=math.inf)


def _quota(folder: Path, *files: str) -> float:
    try:
        quota, period = " ".join((folder / name).read_text().strip() for name in files).split()
        granted = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # not here, or "max"
        return math.inf
    return granted if granted > 0 else math.inf  # version 1 writes -1 for no limit


def _with_parents(mount: Path, path: str) -> list[Path]:
    group = mount / path.lstrip("/")
    folders = [group, *group.parents]
    return folders[: folders.index(mount) + 1]
