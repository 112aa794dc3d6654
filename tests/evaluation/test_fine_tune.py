"""Fine-tuning learns a task, and does not modify the original backbone."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmoco.errors import ConfigError
from fastmoco.evaluation.confusion import measure
from fastmoco.evaluation.features import extract
from fastmoco.evaluation.fine_tune import fine_tune
from fastmoco.evaluation.labelled_views import LabelledViews
from fastmoco.evaluation.settings import FINE_TUNE
from fastmoco.model.encoder import build_encoder
from pipelines.augment.presets import CIFAR_MEAN, CIFAR_STD
from pipelines.backends.resident import ResidentCrops
from pipelines.data.index import ImageIndex

CPU = torch.device("cpu")


def striped(count: int) -> ImageIndex:
    """Three classes in random colours: horizontal stripes, vertical stripes, none."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 3
    pixels = generator.integers(60, 120, (count, 1, 1, 3)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
    pixels[labels == 0, ::4] += 100
    pixels[labels == 1, :, ::4] += 100
    return ImageIndex.from_pixels("stripes", pixels, labels, ("across", "down", "none"))


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_encoder("resnet18", width=0.125, stem="cifar").backbone.eval()


def labelled(index: ImageIndex) -> LabelledViews:
    assert index.labels is not None
    source = ResidentCrops(index, 16, CPU, 1)
    return LabelledViews(
        index, np.arange(len(index)), index.labels, source, 16, CIFAR_MEAN, CIFAR_STD, "padded", 16, drop_last=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_and_the_original_is_unchanged(backbone: torch.nn.Module, dtype: torch.dtype) -> None:
    index = striped(96)
    before = copy.deepcopy(backbone.state_dict())
    model = fine_tune(backbone, 64, 3, labelled(index), replace(FINE_TUNE, epochs=4), dtype, CPU)
    for name, tensor in backbone.state_dict().items():
        assert (tensor == before[name]).all(), f"{name} of the original changed"
    assert any((a != b).any() for a, b in zip(model.backbone.parameters(), backbone.parameters(), strict=True))
    assert not model.training
    source, positions = ResidentCrops(index, 16, CPU, 1), np.arange(96)
    scores = extract(model, source, index, positions, 16, CIFAR_MEAN, CIFAR_STD)
    assert index.labels is not None
    assert measure(scores, torch.from_numpy(index.labels)).top1_percent > 90


def test_batch_norm_statistics_are_updated(backbone: torch.nn.Module) -> None:
    model = fine_tune(
        backbone, 64, 3, labelled(striped(32)), replace(FINE_TUNE, epochs=1, lr=1e-12), torch.float32, CPU
    )
    updated = [name for name, buffer in model.backbone.named_buffers() if (buffer != backbone.state_dict()[name]).any()]
    assert any(name.endswith("running_mean") for name in updated)


def test_divergence_names_the_flag(backbone: torch.nn.Module) -> None:
    sgd, views = replace(FINE_TUNE, epochs=2, lr=1e30), labelled(striped(32))
    with pytest.raises(ConfigError, match="lower --fine-tune-lr"):
        fine_tune(backbone, 64, 3, views, sgd, torch.float32, CPU)
