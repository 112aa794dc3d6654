"""Several arrays in one buffer keep their values, types and shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.transfer import packed_bytes, to_device_at_once

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
ARRAYS = [
    np.arange(5),
    np.array([[True, False, True]]),
    np.zeros(0, dtype=np.int64),
    np.arange(24, dtype=np.int32).reshape(3, 2, 4)[:, 1],
    np.linspace(0, 1, 9, dtype=np.float32).reshape(3, 3).T,
    np.zeros((0, 7), dtype=np.float32),
    np.array([2**62, -1]),
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("spare", [None, 0, 40])
def test_arrays_are_copied_at_once(device: torch.device, spare: int | None) -> None:
    """Into new memory, memory of the exact size, and larger memory."""
    memory = None
    if spare is not None:
        memory = torch.full((packed_bytes(ARRAYS) + spare,), 77, dtype=torch.uint8, device=device)
    for _ in range(2):  # the memory may be used again
        tensors = to_device_at_once(ARRAYS, device, memory)
        assert len(tensors) == len(ARRAYS)
        for tensor, values in zip(tensors, ARRAYS, strict=True):
            assert tensor.device.type == device.type
            assert tensor.dtype == torch.from_numpy(values).dtype
            assert torch.equal(tensor.cpu(), torch.from_numpy(values))
            assert memory is None or tensor.untyped_storage().data_ptr() == memory.data_ptr()
    if memory is not None and spare:
        assert memory[-spare:].unique().tolist() == [77]


def test_no_arrays() -> None:
    assert packed_bytes([]) == 0
    assert to_device_at_once([], torch.device("cpu")) == []
