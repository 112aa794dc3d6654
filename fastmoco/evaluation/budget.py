"""Memory that an evaluation may hold: every matrix with one row per image of a data set is checked against it.

N images in the bank · M queries
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from fastmoco.distributed.world import World

SHARE_OF_FREE = 0.5  # the rest is for the network's activations, the loader and temporary copies
_UNKNOWN_FREE_BYTES = 4 * 2**30  # where the operating system does not say
_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")  # in RuntimeErrors of torch and its libraries


class SharedOutOfMemoryError(torch.OutOfMemoryError):
    """One rank has run out of memory, and all raise this, so that they can go on together."""


def budget_bytes(device: torch.device) -> int:
    """Bytes that an evaluation may hold on a device: half of what is free now."""
    return int(SHARE_OF_FREE * free_bytes(device))


def shared_budget_bytes(world: World) -> int:
    """`budget_bytes` of one rank, the same on all: of the rank with the least. Ranks of a machine share its memory."""
    own = budget_bytes(world.device)
    if world.size == 1:
        return own
    if world.device.type == "cpu":
        own //= world.rank_info.local_size
    return int(world.all_gather(torch.tensor([own], device=world.device)).wait().min())


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated now: on CUDA with the unused blocks of torch's cache; on a CPU that of the host, or
    of the container if that has less."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return int(min(_free_on_host(), _free_in_container()))


def rows_that_fit(
    bank: int, queries: int, row_bytes: tuple[int, int], budget: int, least: int
) -> tuple[int, int] | None:
    """The largest numbers of bank and query rows, the larger halved until both fit in `budget` bytes.

    Halves, since free memory fluctuates: the same images are chosen unless it changes by a factor. row_bytes are those
    of a row of the bank and of the queries. None if that leaves fewer than `least` rows of a bank that has more.
    """
    least = min(least, bank)
    while bank * row_bytes[0] + queries * row_bytes[1] > budget:
        if bank * row_bytes[0] >= queries * row_bytes[1]:
            bank //= 2
        else:
            queries //= 2
        if bank < least or queries < 1:
            return None
    return bank, queries


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def release_cached_memory(device: torch.device) -> None:
    """Return the unused blocks of torch's cache to the device. CUDA graphs and DALI cannot use them otherwise."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gibibytes(count: int) -> str:
    """A number of bytes as text: `10.5 GiB`."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"


def _free_on_host(path: str = "/proc/meminfo") -> int:
    """What Linux estimates to be available, with caches that it would drop."""
    try:
        fields = dict(line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        names = getattr(os, "sysconf_names", {})
        if "SC_AVPHYS_PAGES" in names:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return _UNKNOWN_FREE_BYTES


def _free_in_container(root: str = "/") -> float:
    """What the control groups of this process, version 1 or 2, and their parents leave of their limits; inf without."""
    try:
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    free = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files, mount = ("memory.max", "memory.current", "inactive_file"), Path(root, "sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = Path(root, "sys/fs/cgroup/memory")
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            free = min(free, _left_of_limit(folder, *files))
            if folder == mount:
                break
    return free


def _left_of_limit(folder: Path, limit: str, usage: str, cache: str) -> float:
    """Limit − usage + file cache that can be dropped, of one control group; inf without a limit."""
    try:
        used = int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int((folder / limit).read_text()) - used + int(statistics.get(cache, 0)))
    except (OSError, ValueError):  # no such group here, or its limit is "max"
        return math.inf
