"""The preprocessing of load_backbone gives the views of every evaluation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from fastmoco.backbones.preprocessing import Preprocessing
from fastmoco.evaluation.features import Normalise
from pipelines.augment.presets import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD
from pipelines.backends.resident import ResidentCrops
from pipelines.backends.torch import TorchCrops
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import eval_plans
from tests.oddities import good_files, picture

CPU = torch.device("cpu")
ODD = {file.name: file for file in good_files() if not file.name.startswith("faulty")}  # which Pillow refuses


def evaluated(kind: type[ResidentCrops] | type[TorchCrops], index: ImageIndex, side: int) -> Tensor:
    """(N, 3, S, S): the views of an evaluation."""
    source = kind(index, side, CPU, 0)
    plans = eval_plans(index.sizes, np.arange(len(index)), len(index), side)
    crops = next(iter(source.crops(plans))).images[0]
    return Normalise(IMAGENET_MEAN, IMAGENET_STD, crops.device)(crops)


def grey_levels(actual: Tensor, expected: Tensor) -> Tensor:
    """Absolute differences of pixel values from 0 to 255."""
    return (actual - expected).abs() * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255


def real_images(test_data: Path, tmp_path: Path, name: str) -> ImageIndex:
    folder = tmp_path / "images"
    folder.mkdir()
    kind = {"cifar10": "cifar10/test/*/*.jpg", "photographs": "imagenet-60/*.JPEG"}[name]
    for path in sorted(test_data.glob(kind))[:: 997 if name == "cifar10" else 6]:
        (folder / path.name).symlink_to(path)
    return load_dataset(str(folder), data_root=str(tmp_path)).train


@pytest.mark.parametrize(("name", "side"), [("cifar10", 32), ("photographs", 224), ("photographs", 64)])
def test_real_images_as_in_an_evaluation(test_data: Path, tmp_path: Path, name: str, side: int) -> None:
    """Equal to one grey level from files and from tensors; a larger difference if JPEGs are decoded at reduced size."""
    index = real_images(test_data, tmp_path, name)
    assert index.paths is not None
    assert len(index) >= 10
    preprocess = Preprocessing(side, IMAGENET_MEAN, IMAGENET_STD)
    from_files = torch.stack([preprocess(Image.open(path)) for path in index.paths])
    from_tensors = torch.stack(
        [preprocess(torch.from_numpy(index.read(i).copy()).permute(2, 0, 1)) for i in range(len(index))]
    )
    assert from_files.shape == (len(index), 3, side, side)
    assert torch.equal(from_files, from_tensors)
    assert grey_levels(from_files, evaluated(ResidentCrops, index, side)).max() < 1.001
    reduced = grey_levels(from_files, evaluated(TorchCrops, index, side))
    assert reduced.mean() < 1.3
    assert reduced.max() < 20


@pytest.mark.parametrize("name", ODD)
def test_odd_files_have_the_colours_and_the_orientation_of_the_pipelines(name: str) -> None:
    file = ODD[name]
    preprocess = Preprocessing(16, IMAGENET_MEAN, IMAGENET_STD)
    with Image.open(io.BytesIO(file.data)) as image:
        actual = preprocess(image)
    expected = preprocess(torch.from_numpy(file.pixels.copy()).permute(2, 0, 1))
    assert grey_levels(actual, expected).mean() <= file.tolerance + 1e-4


@pytest.mark.parametrize("side", [32, 64, 72, 224])
@pytest.mark.parametrize("size", [(300, 200), (201, 333), (20, 20), (1, 9), (40, 339)])
def test_the_centre_is_resized_and_normalised(side: int, size: tuple[int, int]) -> None:
    """Against Pillow, whose antialiased bilinear filter agrees with torch's to one grey level: the centre square for
    small views, torchvision's Resize and CenterCrop for others, also of images that are very wide."""
    pixels = picture(300, 340)[: size[0], : size[1]]
    image, length = Image.fromarray(pixels), min(size)
    top, left = (size[0] - length) // 2, (size[1] - length) // 2
    if side > 64:
        view = Compose([Resize(round(side * 256 / 224)), CenterCrop(side)])(image)
    else:
        square = image.crop((left, top, left + length, top + length))
        view = square.resize((side, side), Image.Resampling.BILINEAR)
    expected = np.asarray(view) / 255
    actual = Preprocessing(side, CIFAR_MEAN, CIFAR_STD)(Image.fromarray(pixels)).permute(1, 2, 0)
    difference = np.abs(actual.numpy() * np.array(CIFAR_STD) + CIFAR_MEAN - expected)
    assert actual.dtype == torch.float32
    assert difference.max() * 255 < 1.01


def test_batches_and_grey_pictures() -> None:
    preprocess = Preprocessing(8, CIFAR_MEAN, CIFAR_STD)
    images = torch.randint(0, 256, (2, 5, 3, 20, 30), dtype=torch.uint8)
    views = preprocess(images)
    assert views.shape == (2, 5, 3, 8, 8)
    torch.testing.assert_close(views[1, 4], preprocess(images[1, 4]))
    grey = Image.fromarray(images[0, 0, 0].numpy())
    torch.testing.assert_close(preprocess(grey), preprocess(images[0, 0, :1].expand(3, -1, -1)))


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8).byte(), torch.zeros(8, 8).byte()])
def test_invalid_images_are_rejected(image: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a PIL image or uint8 RGB"):
        Preprocessing(8, CIFAR_MEAN, CIFAR_STD)(image)
