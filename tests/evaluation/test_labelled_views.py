"""Labelled crops: every image once an epoch with its own label, moved and flipped as the numbers say."""

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


def views(index: ImageIndex, **changes: Any) -> LabelledViews:
    positions = np.arange(2, 23)
    assert index.labels is not None
    made = LabelledViews(
        index, positions, index.labels[positions], ResidentCrops(index, 32, CPU, 1), 32, ZERO, ONE, "padded", 8
    )
    return replace(made, **changes)


def collected(made: LabelledViews, epochs: int) -> tuple[Tensor, Tensor, list[int]]:
    found = list(made.batches(epochs))
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found]), [len(y) for _, y in found]


@pytest.mark.parametrize("kind", ["center", "padded", "resized"])
def test_every_image_once_an_epoch_with_its_label(index: ImageIndex, kind: str) -> None:
    images, labels, sizes = collected(views(index, kind=kind), 2)
    assert sizes == [8, 8, 5] * 2
    assert images.shape == (42, 3, 32, 32)
    assert index.labels is not None
    wanted = sorted(index.labels[2:].tolist())
    assert sorted(labels[:21].tolist()) == sorted(labels[21:].tolist()) == wanted
    assert labels[:21].tolist() != labels[21:].tolist(), "an order of its own"


def test_a_last_small_batch_is_left_out_where_batch_norm_needs_it(index: ImageIndex) -> None:
    made = views(index, drop_last=True)
    assert made.steps_per_epoch == 2
    assert collected(made, 2)[2] == [8] * 4


def test_centred_views_are_those_of_the_evaluation(index: ImageIndex) -> None:
    images, _, _ = collected(views(index, kind="center"), 1)
    source = ResidentCrops(index, 32, CPU, 1)
    wanted = extract(lambda x: x, source, index, np.arange(2, 23), 32, ZERO, ONE)
    assert {x.numpy().tobytes() for x in images.contiguous()} == {x.numpy().tobytes() for x in wanted.contiguous()}


def test_padded_views_are_the_image_moved_over_black_and_flipped_half_the_time(index: ImageIndex) -> None:
    """Each is found again as a window of its padded image, or of its mirror image, with its own label."""
    assert index.pixels is not None
    assert index.labels is not None
    images, labels, _ = collected(views(index), 12)
    padded = np.pad(index.pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    flips, offsets = [], []
    for image, label in zip(images.permute(0, 2, 3, 1).round().byte().numpy(), labels.tolist(), strict=True):
        # the pixel in the middle of the view says where it can be from
        for flipped, view in ((False, image), (True, image[:, ::-1])):
            places = np.argwhere((padded[:, 16:25, 16:25] == view[16, 16]).all(-1))
            hits = [
                (i, row, column)
                for i, row, column in places.tolist()
                if (padded[i, row : row + 32, column : column + 32] == view).all()
            ]
            for i, row, column in hits:
                assert index.labels[i] == label
                flips.append(flipped)
                offsets.append((row, column))
    assert len(flips) == len(images), "every view is one window of one image"
    assert 0.4 < np.mean(flips) < 0.6
    assert {row for row, _ in offsets} == {column for _, column in offsets} == set(range(9))


def test_the_same_seed_gives_the_same_views_from_any_source(index: ImageIndex) -> None:
    for kind in ("padded", "resized"):
        first, again = views(index, kind=kind), views(index, kind=kind, source=TorchCrops(index, 32, CPU, 0))
        other = views(index, kind=kind, seed=1)
        assert (collected(first, 1)[0] - collected(again, 1)[0]).abs().max() <= 1
        assert (collected(first, 1)[0] != collected(other, 1)[0]).any()


def test_resized_views_show_a_part(index: ImageIndex) -> None:
    """A gradient from 0 to 250: a view of 8 to 100 % of the area spans less of it."""
    assert index.labels is not None
    ramp = np.broadcast_to(np.linspace(0, 250, 32).astype(np.uint8)[None, :, None, None], (23, 32, 32, 3)).copy()
    tilted = ImageIndex.from_pixels("ramp", ramp, index.labels, index.class_names)
    made = views(tilted, kind="resized")
    images, _, _ = collected(made, 4)
    spans = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    assert 60 < spans.min() < 150
    assert spans.max() > 220
    assert made.steps_per_epoch == 3
