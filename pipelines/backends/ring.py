"""Batches that worker processes write into memory which this process reads: nothing but their numbers is sent.

A tensor that a worker makes in shared memory for every task costs as much as decoding what is in it: the system zeroes
its pages, both sides map them, and a file descriptor changes hands. Here the memory is made once.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections import deque
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import DataError

LENT = 2  # batches that are given out as they lie: the one in use and the one behind it; further ones are copied


class SharedBytes:
    """Zeroed memory that processes started later also see. It goes with the last of them, however that ends.

    It is a file without a name in memory, not one in /dev/shm, which containers limit to 64 MiB.
    """

    def __init__(self, size: int) -> None:
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("fastmoco-crops")
        else:
            with tempfile.TemporaryFile(buffering=0) as file:
                self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        os.truncate(self._descriptor, size)
        self.array = _map(self._descriptor, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Attached, (DupFd(self._descriptor), len(self.array))


class _Attached:
    """The same memory in another process, once the file descriptor has arrived there with the process itself."""

    def __init__(self, descriptor: Any, size: int) -> None:
        number = descriptor.detach()
        self.array = _map(number, size)
        os.close(number)


def _map(descriptor: int, size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)


class Ring:
    """Slots for batches of uint8, which are taken, filled by workers and handed out in the same order.

    batch   shape of the largest batch
    filled  batches that may have been taken and not handed out when another is taken
    """

    def __init__(self, batch: tuple[int, ...], filled: int, device: torch.device) -> None:
        self._slot_bytes, self._device = math.prod(batch), device
        slots = filled + 1 + LENT
        self.memory = SharedBytes(slots * self._slot_bytes)
        self._free = deque(range(slots))
        self._copied: dict[int, torch.cuda.Event] = {}  # when the device has what was in a slot
        self._lent: set[int] = set()
        self._pinned = _Pinned(self.memory.array) if device.type == "cuda" else None

    def take(self) -> int:
        """A slot that nobody reads any more."""
        slot = self._free.popleft()
        if (copied := self._copied.pop(slot, None)) is not None:
            copied.synchronize()  # long past: the other free slots have had their turn in between
        return slot

    def offset(self, slot: int) -> int:
        """Where in the memory it begins."""
        return slot * self._slot_bytes

    def hand_out(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The batch in a slot as a tensor on the device, its own for as long as it is kept."""
        start = self.offset(slot)
        batch = self.memory.array[start : start + math.prod(shape)]  # an object that lives as long as tensors show it
        images = torch.from_numpy(batch).view(shape)
        if self._device.type == "cuda":
            on_device = images.to(self._device, non_blocking=True)
            copied = self._copied[slot] = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
            self._free.append(slot)
            return on_device
        if len(self._lent) < LENT:
            self._lent.add(slot)
            weakref.finalize(batch, self._take_back, slot).atexit = False
            return images
        self._free.append(slot)
        return images.clone()

    def _take_back(self, slot: int) -> None:
        self._lent.remove(slot)
        self._free.append(slot)

    def close(self) -> None:
        """Ends copies to the device. Batches that were lent stay."""
        for copied in self._copied.values():
            copied.synchronize()
        self._copied.clear()
        if self._pinned is not None:
            self._pinned.close()


class _Pinned:
    """Memory that a GPU may read by itself, without a copy by the processor first.

    Raises DataError where the driver refuses.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._runtime: Any = torch.cuda.cudart()
        self._address: int | None = None
        try:
            torch.cuda.check_error(self._runtime.cudaHostRegister(array.ctypes.data, array.nbytes, 0))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"cannot pin {array.nbytes / 2**20:.0f} MiB of memory for --pipeline torch ({reason}): use fewer "
                f"--workers, or another --pipeline"
            ) from error
        self._address = array.ctypes.data

    def close(self) -> None:
        """Before the memory goes: an address that is used again would still count as pinned."""
        if self._address is not None:
            torch.cuda.check_error(self._runtime.cudaHostUnregister(self._address))
            self._address = None
