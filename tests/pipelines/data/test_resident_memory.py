"""What the resident pipeline needs while it loads, and what `auto` compares it with."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.backends.select import choose
from pipelines.data import resident_pixels
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from tests.oddities import encode, picture

CPU = torch.device("cpu")


def of_files(count: int, height: int, width: int) -> ImageIndex:
    """An index of files that nobody opens."""
    sizes = np.full((count, 2), (height, width), dtype=np.int32)
    return ImageIndex("files", sizes, paths=tuple(f"{i}.jpg" for i in range(count)))


def test_images_are_in_memory_once_while_loading(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i}.bmp").write_bytes(encode(picture(64, 64), "BMP"))
    index = load_dataset(str(tmp_path), data_root=tmp_path / "cache").train
    needed = resident_pixels.resident_bytes(index)
    tracemalloc.start()
    try:
        loaded = resident_pixels.load(index, CPU, workers=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert loaded.planar
    assert np.array_equal(loaded.pixels[7].permute(0, 2, 1).numpy(), index.read(7))
    assert needed <= peak < 1.5 * needed


@pytest.mark.parametrize(("free", "expected"), [(1000, "resident"), (400, "torch")])
def test_what_the_container_leaves_decides(monkeypatch: pytest.MonkeyPatch, free: int, expected: str) -> None:
    monkeypatch.setattr(resident_pixels, "available_bytes", lambda: free * 2**20)
    name, why = choose("auto", of_files(120, 1600, 1000), CPU)  # 549 MiB decoded
    assert name == expected
    assert f"take 549 MiB of {free:,} MiB free on cpu" in why


def test_on_the_way_to_a_gpu_images_must_fit_in_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_pixels, "free_memory_bytes", lambda device: 80 * 2**30)
    monkeypatch.setattr(resident_pixels, "available_bytes", lambda: 400 * 2**20)
    assert choose("auto", of_files(120, 1600, 1000), torch.device("cuda"))[0] != "resident"
    small = ImageIndex.from_pixels("small", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    assert choose("auto", small, torch.device("cuda"))[0] == "resident"
