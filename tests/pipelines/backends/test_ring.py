"""Batches in memory shared with workers: a returned batch never changes, and no memory leaks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.presets import V2
from pipelines.backends.ring import LENT, Ring
from pipelines.backends.torch import TorchCrops
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from tests.oddities import picture

CPU = torch.device("cpu")
SHAPE = (2, 4, 3)
DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture
def ring() -> Iterator[Ring]:
    ring = Ring(SHAPE, 3, CPU)
    yield ring
    ring.close()


def fill(ring: Ring, value: int) -> torch.Tensor:
    slot = ring.take()
    ring.memory.array[ring.offset(slot) : ring.offset(slot) + 24] = value
    return ring.hand_out(slot, SHAPE)


@pytest.mark.parametrize("kept", [0, 1, LENT, LENT + 5])
def test_a_kept_batch_does_not_change(ring: Ring, kept: int) -> None:
    """For any number of batches, also if only a view is kept, and beyond the size of the ring."""
    batches: list[torch.Tensor] = []
    for value in range(50):
        batches.append(fill(ring, value).flatten(0, 1)[1:])
        batches = batches[-kept:] if kept else []
        first = value + 1 - len(batches)
        assert [int(batch.unique()) for batch in batches] == list(range(first, value + 1))


def test_batches_are_lent_without_a_copy_while_few_are_kept(ring: Ring) -> None:
    start = ring.memory.array.ctypes.data
    inside = [start <= fill(ring, 0).data_ptr() < start + ring.memory.array.nbytes for _ in range(30)]
    assert all(inside)
    kept = [fill(ring, 0) for _ in range(LENT + 1)]
    inside = [start <= batch.data_ptr() < start + ring.memory.array.nbytes for batch in kept]
    assert inside == [True] * LENT + [False]


def test_all_requested_slots_are_available_while_batches_are_lent(ring: Ring) -> None:
    lent = [fill(ring, 0) for _ in range(LENT)]
    slots = [ring.take() for _ in range(4)]  # three being filled, and the next one
    assert len(set(slots)) == 4
    assert all(int(batch.sum()) == 0 for batch in lent)


def test_a_smaller_batch_uses_the_start_of_its_slot(ring: Ring) -> None:
    slot = ring.take()
    ring.memory.array[ring.offset(slot) :][:6] = np.arange(6)
    assert ring.hand_out(slot, (1, 2, 3)).flatten().tolist() == list(range(6))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_outlive_their_iterator_and_then_free_the_memory(workers: int) -> None:
    index = ImageIndex.from_pixels("rolled", np.stack([np.roll(picture(20, 28), i, axis=1) for i in range(64)]))
    planner = Planner(index.sizes, seed=5, batch_size=40, augmentation=V2, shuffle_keys=True)
    source = TorchCrops(index, 16, CPU, workers)
    for _ in range(2):
        crops = source.crops(planner.plans(0, 100))
        kept = [next(crops).images for _ in range(LENT + 2)]
        assert "fastmoco-crops" in Path("/proc/self/maps").read_text()
        copies = [images.clone() for images in kept]
        del crops
        gc.collect()
        assert all(torch.equal(images, copy) for images, copy in zip(kept, copies, strict=True))
        del kept
        open_files = [os.readlink(file) for file in DESCRIPTORS.iterdir() if file.is_symlink()]
        assert not [name for name in open_files if "fastmoco-crops" in name]
        assert "fastmoco-crops" not in Path("/proc/self/maps").read_text()
