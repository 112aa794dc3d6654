"""Labelled views: every image once per epoch with its label, and the distribution of crops and flips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.evaluation.features import extract
from fastmoco.evaluation.labelled_views import LabelledViews
from pipelines.backends.resident import ResidentCrops
from pipelines.backends.torch import TorchCrops
from pipelines.data.index import ImageIndex

CPU = torch.device("cpu")
ZERO, ONE = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # views in grey levels


@pytest.fixture(scope="module")
def index() -> ImageIndex:
    pixels = np.random.default_rng(0).integers(1, 256, (23, 32, 32, 3), dtype=np.uint8)
    return ImageIndex.from_pixels("noise", pixels, np.arange(23) % 3, ("a", "b", "c"))


def views_of(index: ImageIndex, **changes: Any) -> LabelledViews:
    positions = np.arange(2, 23)
    assert index.labels is not None
    views = LabelledViews(
        index, positions, index.labels[positions], ResidentCrops(index, 32, CPU, 1), 32, ZERO, ONE, "padded", 8
    )
    return replace(views, **changes)


def collected(views: LabelledViews, epochs: int) -> tuple[Tensor, Tensor, list[int]]:
    """Images, labels and batch sizes."""
    batches = list(views.batches(epochs))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]), [len(y) for _, y in batches]


@pytest.mark.parametrize("kind", ["center", "padded", "resized"])
def test_every_image_once_per_epoch_with_its_label(index: ImageIndex, kind: str) -> None:
    images, labels, sizes = collected(views_of(index, kind=kind), 2)
    assert sizes == [8, 8, 5] * 2
    assert images.shape == (42, 3, 32, 32)
    assert index.labels is not None
    expected = sorted(index.labels[2:].tolist())
    assert sorted(labels[:21].tolist()) == sorted(labels[21:].tolist()) == expected
    assert labels[:21].tolist() != labels[21:].tolist(), "the order differs between epochs"


def test_drop_last_drops_a_smaller_last_batch(index: ImageIndex) -> None:
    views = views_of(index, drop_last=True)
    assert views.steps_per_epoch == 2
    assert collected(views, 2)[2] == [8] * 4


def test_centre_crops_are_those_of_the_evaluation(index: ImageIndex) -> None:
    images, _, _ = collected(views_of(index, kind="center"), 1)
    source = ResidentCrops(index, 32, CPU, 1)
    expected = extract(lambda x: x, source, index, np.arange(2, 23), 32, ZERO, ONE)
    assert {x.numpy().tobytes() for x in images.contiguous()} == {x.numpy().tobytes() for x in expected.contiguous()}


def test_padded_views_are_crops_of_the_zero_padded_image_and_flipped_half_the_time(index: ImageIndex) -> None:
    """Each view is a window of its padded image or of its mirror image, and has its label."""
    assert index.pixels is not None
    assert index.labels is not None
    images, labels, _ = collected(views_of(index), 12)
    padded = np.pad(index.pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    flips, offsets = [], []
    for image, label in zip(images.permute(0, 2, 3, 1).round().byte().numpy(), labels.tolist(), strict=True):
        # candidate windows: those whose centre pixel matches
        for flipped, view in ((False, image), (True, image[:, ::-1])):
            candidates = np.argwhere((padded[:, 16:25, 16:25] == view[16, 16]).all(-1))
            hits = [
                (i, row, column)
                for i, row, column in candidates.tolist()
                if (padded[i, row : row + 32, column : column + 32] == view).all()
            ]
            for i, row, column in hits:
                assert index.labels[i] == label
                flips.append(flipped)
                offsets.append((row, column))
    assert len(flips) == len(images), "every view is one window of one image"
    assert 0.4 < np.mean(flips) < 0.6
    assert {row for row, _ in offsets} == {column for _, column in offsets} == set(range(9))


def test_views_are_a_function_of_the_seed_for_any_source(index: ImageIndex) -> None:
    for kind in ("padded", "resized"):
        first, again = views_of(index, kind=kind), views_of(index, kind=kind, source=TorchCrops(index, 32, CPU, 0))
        other = views_of(index, kind=kind, seed=1)
        assert (collected(first, 1)[0] - collected(again, 1)[0]).abs().max() <= 1
        assert (collected(first, 1)[0] != collected(other, 1)[0]).any()


def test_resized_views_show_a_region(index: ImageIndex) -> None:
    """On a gradient from 0 to 250, views of 8 to 100 % of the area span part of the range."""
    assert index.labels is not None
    ramp = np.broadcast_to(np.linspace(0, 250, 32).astype(np.uint8)[None, :, None, None], (23, 32, 32, 3)).copy()
    gradients = ImageIndex.from_pixels("ramp", ramp, index.labels, index.class_names)
    views = views_of(gradients, kind="resized")
    images, _, _ = collected(views, 4)
    spans = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    assert 60 < spans.min() < 150
    assert spans.max() > 220
    assert views.steps_per_epoch == 3
