"""The view of evaluation at more than 64 pixels is torchvision's Resize and CenterCrop, on every pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from pipelines.augment.resize import resize_centre, resize_centres
from pipelines.backends.dali import DaliCrops
from pipelines.backends.ffcv import FfcvCrops
from pipelines.backends.resident import ResidentCrops
from pipelines.backends.torch import TorchCrops
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import eval_plans
from tests.oddities import picture

CPU, SIDE = torch.device("cpu"), 96
SIZES = [(150, 200), (201, 133), (97, 97), (110, 500), (1, 9), (60, 300)]


def standard(pixels: np.ndarray, side: int) -> Tensor:
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return Compose([Resize(round(side * 256 / 224), antialias=True), CenterCrop(side)])(image).permute(1, 2, 0)


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    for number, (height, width) in enumerate(SIZES):
        Image.fromarray(picture(300, 500)[:height, :width]).save(tmp_path / f"{number}.png")
    return load_dataset(str(tmp_path), data_root=str(tmp_path / "root")).train


def expected(index: ImageIndex) -> Tensor:
    return torch.stack([standard(np.asarray(index.read(row)), SIDE) for row in range(len(index))])


def levels(found: Tensor, wanted: Tensor) -> int:
    return int((found.int() - wanted.int()).abs().max())


@pytest.mark.parametrize("kind", [TorchCrops, ResidentCrops])
def test_it_is_torchvisions(kind: type[TorchCrops] | type[ResidentCrops], index: ImageIndex) -> None:
    source = kind(index, SIDE, CPU, 0)
    batches = [crops.images for crops in source.crops(eval_plans(index.sizes, np.arange(len(SIZES)), 4, SIDE))]
    assert [images.shape for images in batches] == [(1, 4, SIDE, SIDE, 3), (1, 2, SIDE, SIDE, 3)]
    assert levels(torch.cat(batches, dim=1)[0], expected(index)) <= 1


@pytest.mark.parametrize("kind", [DaliCrops, FfcvCrops])
def test_pipelines_with_a_resize_of_their_own_leave_it_to_torch(
    kind: type[DaliCrops] | type[FfcvCrops], index: ImageIndex
) -> None:
    """Neither DALI nor the file of FFCV is needed: their sources are made without them."""
    source = object.__new__(kind)
    source._index, source._side, source._device = index, SIDE, CPU
    source._threads = source._workers = 0  # type: ignore[attr-defined] - each has one of the two
    (crops,) = source.crops(eval_plans(index.sizes, np.arange(len(SIZES)), 8, SIDE))
    assert levels(crops.images[0], expected(index)) <= 1


def test_images_of_one_size_in_planes(tmp_path: Path) -> None:
    pixels = np.stack([picture(60, 70)[:50, :64], picture(60, 70)[10:, 6:]])
    source = ResidentCrops(ImageIndex.from_pixels("noise", pixels), SIDE, CPU, 0)
    assert source._resident.planar
    (crops,) = source.crops(eval_plans(np.full((2, 2), [50, 64], dtype=np.int32), np.arange(2), 2, SIDE))
    assert levels(crops.images[0], torch.stack([standard(image, SIDE) for image in pixels])) <= 1


def test_a_part_is_resized_as_the_whole() -> None:
    """What a GPU computes, and a CPU for very wide images."""
    images = [torch.from_numpy(picture(300, 500)[:height, :width].copy()) for height, width in SIZES]
    out = torch.empty((len(images), SIDE, SIDE, 3), dtype=torch.uint8)
    resize_centres(images, 110, out)
    assert levels(out, torch.stack([standard(image.numpy(), SIDE) for image in images])) <= 1


def test_a_line_of_pixels_takes_no_memory() -> None:
    """Resized as a whole it would be 110 × 11,000,000 pixels."""
    pixels, out = torch.full((1, 100_000, 3), 77, dtype=torch.uint8), torch.empty((SIDE, SIDE, 3), dtype=torch.uint8)
    resize_centre(pixels, 110, out)
    assert (out == 77).all()
