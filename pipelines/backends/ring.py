"""A ring of batches in shared memory: workers write the images, and only row counts are sent.

A new tensor in shared memory for every task costs as much as decoding its images: the system zeroes its pages, both
processes map them, and a file descriptor is sent. Here the memory is allocated once.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import uuid
import weakref
from collections import deque
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import DataError
from pipelines.platforms import has_fork_server
from pipelines.transfer import wait_for

LENT = 2  # batches handed out without a copy: the one in use and the next; further ones are copied


class SharedBytes:
    """Zeroed memory shared with processes started later, freed with the last of them, however that exits.

    It is an unnamed file in memory, not one in /dev/shm, which containers limit to 64 MiB. On Windows it has a name.
    """

    def __init__(self, size: int) -> None:
        if not has_fork_server():  # Windows, which passes no file descriptors
            self._name = f"fastmoco-{uuid.uuid4()}"
            self.array = _map_named(self._name, size)
            return
        self._name = None
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("fastmoco-crops")
        else:
            with tempfile.TemporaryFile(buffering=0) as file:
                self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        os.truncate(self._descriptor, size)
        self.array = _map(self._descriptor, size)

    def __reduce__(self) -> tuple[Any, ...]:
        handle = self._name or reduction.DupFd(self._descriptor)  # pyright: ignore[reportAttributeAccessIssue]
        return _Attached, (handle, len(self.array))


class _Attached:
    """The same memory in another process, mapped by name or from the file descriptor it inherited."""

    def __init__(self, handle: Any, size: int) -> None:
        if isinstance(handle, str):
            self.array = _map_named(handle, size)
            return
        descriptor = handle.detach()
        self.array = _map(descriptor, size)
        os.close(descriptor)


def _map_named(name: str, size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, size, tagname=name), dtype=np.uint8)  # pyright: ignore[reportCallIssue]


def _map(descriptor: int, size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)


class Ring:
    """Slots for uint8 batches, which are taken, filled by workers and handed out in the same order.

    batch   shape of the largest batch
    filled  maximum number of batches taken but not yet handed out when another is taken
    """

    def __init__(self, batch: tuple[int, ...], filled: int, device: torch.device) -> None:
        self._slot_bytes, self._device = math.prod(batch), device
        slots = filled + 1 + LENT
        self.memory = SharedBytes(slots * self._slot_bytes)
        self._free = deque(range(slots))
        self._copied: dict[int, torch.cuda.Event] = {}  # recorded once a slot is copied to the device
        self._lent: set[int] = set()
        self._pinned = _Pinned(self.memory.array) if device.type == "cuda" else None

    def take(self) -> int:
        """A slot that is no longer read. Waits if the host is more batches ahead of the device than there are slots."""
        slot = self._free.popleft()
        if (copied := self._copied.pop(slot, None)) is not None:
            wait_for(copied)
        return slot

    def offset(self, slot: int) -> int:
        """Start of a slot in the memory, in bytes."""
        return slot * self._slot_bytes

    def hand_out(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The batch in a slot as a tensor on the device, which is not overwritten while it is in use."""
        start = self.offset(slot)
        batch = self.memory.array[start : start + math.prod(shape)]  # lives as long as any tensor that refers to it
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
        """Waits for copies to the device. Lent batches remain valid."""
        for copied in self._copied.values():
            copied.synchronize()
        self._copied.clear()
        if self._pinned is not None:
            self._pinned.close()


class _Pinned:
    """Page-locks memory, so that the GPU reads it without a staging copy. Raises DataError if the driver refuses."""

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
        """Unpins, before the memory is freed: otherwise a reused address would still count as pinned."""
        if self._address is not None:
            torch.cuda.check_error(self._runtime.cudaHostUnregister(self._address))
            self._address = None
