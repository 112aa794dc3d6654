"""Memory that an evaluation may hold: every matrix with one row per image of a data set is checked against it.

N images in the bank · M queries
"""

from __future__ import annotations

import torch

from fastmoco.distributed.world import World
from pipelines.host_memory import available_bytes

SHARE_OF_FREE = 0.5  # the rest is for the network's activations, the loader and temporary copies
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
    return available_bytes()


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
