"""Asynchronous copies of small arrays from the host to the device, and waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: of every array in a common buffer


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of the same values on `device`; on CUDA through pinned memory and ordered in the current stream."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_device_at_once(arrays: Sequence[np.ndarray], device: torch.device, memory: Tensor | None = None) -> list[Tensor]:
    """`to_device` of several arrays; on CUDA with one copy for all of them, into one buffer.

    memory  (n,) uint8 on the device, the buffer to use; n must be at least `packed_bytes`
    """
    if device.type != "cuda" and memory is None:
        return [to_device(values, device) for values in arrays]
    arrays = [np.ascontiguousarray(values) for values in arrays]
    starts = _starts(arrays)
    pinned = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = pinned.numpy()
    for start, values in zip(starts, arrays, strict=False):
        host[start : start + values.nbytes] = values.reshape(-1).view(np.uint8)
    memory = torch.empty(starts[-1], dtype=torch.uint8, device=device) if memory is None else memory[: starts[-1]]
    memory.copy_(pinned, non_blocking=True)
    return [
        memory[start : start + values.nbytes].view(torch.from_numpy(np.empty(0, values.dtype)).dtype).view(values.shape)
        for start, values in zip(starts, arrays, strict=False)
    ]


def packed_bytes(arrays: Sequence[np.ndarray]) -> int:
    """Size of the buffer that `to_device_at_once` needs for these arrays."""
    return _starts(arrays)[-1]


def _starts(arrays: Sequence[np.ndarray]) -> list[int]:
    """The first byte of every array in their common buffer, and its size."""
    sizes = [-(-values.nbytes // _ALIGNMENT) * _ALIGNMENT for values in arrays]
    return [0, *np.cumsum(sizes).tolist()]


def wait_for(event: torch.cuda.Event) -> None:
    """Waits until the device has passed the event: without a call that blocks where it has already."""
    if not event.query():
        event.synchronize()
