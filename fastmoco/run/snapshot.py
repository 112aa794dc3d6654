"""Copies of tensors as they are now, made without waiting for the device while training goes on.

Many tensors of a run are views of a few flat buffers (`fastmoco.step.flat_params`), so whole storages are copied, each
once: 9 copies for the 312 tensors of a ResNet-18. On a GPU they go to pinned memory, in the order of the current
stream: after the step before and before the next one, so that the copy needs neither device memory nor other
synchronisation. The GPU computes nothing meanwhile: 6 to 12 ms for the 290 MB of a ResNet-50 at 25 to 50 GB/s of PCIe.
A copy on the device first would be quicker, but would raise the peak memory by the size of the state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Snapshot:
    """Host copies of tensors, some of which may still be on their way from the device."""

    def __init__(self, tensors: dict[str, Tensor], copied: torch.cuda.Event | None) -> None:
        self._tensors, self._copied = tensors, copied

    def wait(self) -> dict[str, Tensor]:
        """The tensors on the CPU, once they are copied; with shapes and strides as before. Any thread may wait."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors


class HostBuffers:
    """Host memory for snapshots, allocated by the first one and reused by each later one, which overwrites it.

    not_pinned  why the memory for tensors of a GPU is not pinned, so that copies block the host; empty if it is
    """

    def __init__(self) -> None:
        self.not_pinned = ""
        self._buffers: list[Tensor] = []

    def take(self, tensors: Mapping[str, Tensor]) -> Snapshot:
        """Start to copy the tensors, all of one device. Later changes to them, in the current stream, are not seen.

        Nothing may use an earlier snapshot of these buffers any more.
        """
        devices = {tensor.device for tensor in tensors.values()}
        assert len(devices) <= 1, devices
        on_gpu = any(device.type == "cuda" for device in devices)
        copies: dict[tuple[int, int], torch.UntypedStorage] = {}
        host: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            key = storage.data_ptr(), storage.nbytes()
            if key not in copies:
                source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                buffer = self._buffer(len(copies), storage.nbytes(), on_gpu)
                copies[key] = buffer.copy_(source, non_blocking=on_gpu).untyped_storage()
            empty = torch.empty(0, dtype=tensor.dtype)
            host[name] = empty.set_(copies[key], tensor.storage_offset(), tensor.shape, tensor.stride())
        copied = None
        if on_gpu:
            copied = torch.cuda.Event(blocking=True)  # the thread that waits sleeps: training needs the core
            copied.record(torch.cuda.current_stream(*devices))
        return Snapshot(host, copied)

    def _buffer(self, number: int, size_bytes: int, pinned: bool) -> Tensor:
        if number == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[number].nbytes != size_bytes:
            self._buffers[number] = self._allocate(size_bytes, pinned)
        return self._buffers[number]

    def _allocate(self, size_bytes: int, pinned: bool) -> Tensor:
        if pinned and not self.not_pinned:
            try:
                return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:  # some systems permit little, such as WSL
                self.not_pinned = str(error).partition("\n")[0]
        return torch.empty(size_bytes, dtype=torch.uint8)
