"""Large JPEGs with sharp edges or damaged data give the same views on every backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipelines.augment.presets import V2
from pipelines.backends.select import open_source
from pipelines.data.beton import read_index
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from tests.oddities import encode
from tools.make_ffcv import Settings, convert

CPU, SIDE = torch.device("cpu"), 52
HEIGHT, WIDTH = 640, 880


def sharp() -> np.ndarray:
    """(H, W, 3) uint8: black and white squares of 8 pixels, shifted from the blocks of a JPEG."""
    random = np.random.Generator(np.random.Philox(0))
    squares = random.integers(0, 2, (HEIGHT // 8 + 1, WIDTH // 8 + 1, 3), dtype=np.uint8) * np.uint8(255)
    return squares.repeat(8, axis=0).repeat(8, axis=1)[3 : 3 + HEIGHT, 3 : 3 + WIDTH]


def damaged(data: bytes) -> bytes:
    """A JPEG with restart markers whose compressed data is wrong in places, which decoders only warn about."""
    wrong = bytearray(data)
    start = wrong.index(b"\xff\xda") + 16
    for at in range(start + 500, len(wrong) - 2, 997):
        if 0xFF not in wrong[at - 1 : at + 2]:
            wrong[at] ^= 0x55
    return bytes(wrong).replace(b"\xff\xff", b"\xff\xfe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    image = Image.fromarray(sharp())
    (folder / "damaged.jpg").write_bytes(damaged(encode(image, "JPEG", quality=90, restart_marker_blocks=40)))
    (folder / "sharp.jpg").write_bytes(encode(image, "JPEG", quality=90, subsampling=0))
    (folder / "smooth-colour.jpg").write_bytes(encode(image, "JPEG", quality=90, subsampling=2))
    return folder


def crops(index: ImageIndex, name: str) -> np.ndarray:
    """(steps, V, B, S, S, 3) int64"""
    planner = Planner(index.sizes, seed=1, batch_size=len(index), augmentation=V2, shuffle_keys=False)
    source = open_source(name, index, SIDE, CPU, 0 if name == "torch" else 1)
    try:
        return np.stack([c.images.numpy().astype(np.int64) for c in source.crops(planner.plans(0, 4))])
    finally:
        source.close()


@pytest.mark.parametrize("name", ["torch", "dali", "ffcv"])
def test_a_large_sharp_or_damaged_jpeg_gives_the_same_views(
    folder: Path, tmp_path: Path, name: str, require_backend: Callable[[str], None]
) -> None:
    """A large JPEG with sharp edges or damaged data gives the same views on every backend, to 1 level of 255."""
    if name != "torch":
        require_backend(name)
    index = load_dataset(str(folder), data_root=tmp_path).train
    expected = crops(index, "resident")
    if name == "ffcv":
        convert(index, Settings(data=(str(folder),), out=str(tmp_path / "a.beton"), workers=1), Console(quiet=True))
        index = read_index(str(tmp_path / "a.beton"))
    assert np.abs(crops(index, name) - expected).max(initial=0) <= 1
