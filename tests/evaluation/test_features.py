"""Every image is extracted exactly once, and features equal a direct computation for any batch size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.evaluation import features
from fastmoco.evaluation.features import Normalise, extract
from pipelines.augment.presets import CIFAR_MEAN, CIFAR_STD
from pipelines.backends.resident import ResidentCrops
from pipelines.data.index import ImageIndex
from pipelines.views import BatchPlan, Crops

CPU = torch.device("cpu")


class ZeroSource:
    """Crops without an operation of their own."""

    def __init__(self, index: ImageIndex) -> None:
        self.images = torch.zeros(1, len(index), 8, 8, 3, dtype=torch.uint8)

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        return (Crops(self.images[:, : len(plan.indices)], plan) for plan in plans)

    def close(self) -> None:
        pass


@pytest.fixture
def index() -> ImageIndex:
    pixels = np.random.default_rng(0).integers(0, 256, (23, 12, 16, 3), dtype=np.uint8)
    return ImageIndex.from_pixels("noise", pixels)


def direct(index: ImageIndex, positions: np.ndarray, side: int) -> Tensor:
    """(N, 3, S, S): the largest centre square, resized and normalised, one image at a time."""
    views = []
    for i in positions:
        square = torch.from_numpy(index.read(i)[:, 2:14].copy()).permute(2, 0, 1)[None].double()
        crop = F.interpolate(square, size=(side, side), mode="bilinear", antialias=True)[0].round()
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
        views.append((crop / 255 - mean) / std)
    return torch.stack(views).float()


@pytest.mark.parametrize("batch", [5, 8, 23, 256])
@pytest.mark.parametrize("count", [1, 8, 23])
def test_equals_a_direct_computation(index: ImageIndex, monkeypatch, batch: int, count: int) -> None:
    monkeypatch.setattr(features, "BATCH", batch)
    positions = np.random.default_rng(1).permutation(23)[:count]
    source = ResidentCrops(index, 8, CPU, 1)
    seen: list[torch.Size] = []

    def function(images: Tensor) -> Tensor:
        seen.append(images.shape)
        return images.flatten(1)

    extracted = extract(function, source, index, positions, 8, CIFAR_MEAN, CIFAR_STD)
    assert extracted.dtype == torch.float32
    torch.testing.assert_close(
        extracted, direct(index, positions, 8).flatten(1), rtol=0, atol=0.03
    )  # half a grey level
    assert set(seen) == {torch.Size([min(batch, count), 3, 8, 8])}, "a compiled function would compile again"


def test_low_precision_features_are_returned_as_float32(index: ImageIndex) -> None:
    source = ResidentCrops(index, 8, CPU, 1)
    extracted = extract(lambda x: x.mean((2, 3)).bfloat16(), source, index, np.arange(5), 8, CIFAR_MEAN, CIFAR_STD)
    assert extracted.dtype == torch.float32
    assert extracted.shape == (5, 3)
    assert not extracted.requires_grad


def test_normalisation_equals_that_of_training() -> None:
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8))
    views = Normalise(CIFAR_MEAN, CIFAR_STD, CPU)(crops)
    assert views.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    expected = (crops.permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(views, expected, rtol=0, atol=2e-6)


def test_constants_are_copied_to_the_device_once_and_nothing_is_read_from_it(index: ImageIndex, monkeypatch) -> None:
    """Otherwise the host waits for the device in every batch."""
    copied, read = [], []
    original = features.to_device
    monkeypatch.setattr(features, "to_device", lambda *values: copied.append(values) or original(*values))
    for name in ("item", "tolist", "cpu", "__bool__"):
        monkeypatch.setattr(Tensor, name, lambda *_, name=name: read.append(name))
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a blocking copy on CUDA"))
    extract(lambda x: x.flatten(1), ZeroSource(index), index, np.arange(23), 8, CIFAR_MEAN, CIFAR_STD, 4)
    assert len(copied) == 2
    assert read == []
