"""Crop boxes against a loop written from torchvision's RandomResizedCrop with the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from pipelines.plan.boxes import ATTEMPTS, sample_boxes
from pipelines.randomness import Domain, philox, uniform

SCALES = [(0.2, 1.0), (0.08, 1.0), (1.0, 1.0), (0.9, 1.0)]


def box_of(seed: int, epoch: int, view: int, sample: int, size: tuple[int, int], scale, ratio) -> list[int]:
    """RandomResizedCrop.get_params, one image at a time, its random numbers taken from Philox."""
    height, width = size
    for attempt in range(ATTEMPTS):
        words = philox(seed, Domain.BOX, slot=attempt, view=view, sample=sample, epoch=epoch)
        area_u, ratio_u, top_u, left_u = uniform(words).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * ratio_u)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(top_u * (height - h + 1)), int(left_u * (width - w + 1)), h, w]
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (0.1, 0.2)], ids=str)
def test_equals_the_loop(scale, ratio) -> None:
    sizes = [(32, 32), (375, 500), (500, 375), (10, 300), (300, 10), (1, 1), (1, 7), (2, 3), (4000, 3001), (64, 49)]
    samples = np.arange(20, 30)
    actual = sample_boxes(11, 3, samples, np.array(sizes, dtype=np.int32), scale, ratio)
    assert actual.shape == (2, 10, 4)
    assert actual.dtype == np.int32
    for view, i in np.ndindex(2, 10):
        expected = box_of(11, 3, view, int(samples[i]), sizes[i], scale, ratio)
        assert actual[view, i].tolist() == expected, (view, sizes[i])


@given(
    st.lists(st.tuples(st.integers(1, 6000), st.integers(1, 6000)), min_size=1, max_size=20),
    st.integers(0, 2**32 - 1),
    st.sampled_from(SCALES),
)
@example([(1, 1), (1, 6000), (6000, 1), (2, 1)], 0, (0.2, 1.0))
def test_boxes_are_inside_their_image(sizes: list[tuple[int, int]], seed: int, scale: tuple[float, float]) -> None:
    image_sizes = np.array(sizes, dtype=np.int32)
    boxes = sample_boxes(seed, 0, np.arange(len(sizes)), image_sizes, scale)
    top, left, height, width = np.moveaxis(boxes, -1, 0)
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height <= image_sizes[:, 0]).all()
    assert (left + width <= image_sizes[:, 1]).all()


def test_the_boxes_of_an_image_do_not_depend_on_the_batch() -> None:
    sizes = np.array([[30, 40], [900, 20], [5, 5], [64, 64]], dtype=np.int32)
    together = sample_boxes(2, 1, np.array([8, 3, 5, 1]), sizes, (0.2, 1.0))
    alone = sample_boxes(2, 1, np.array([5]), sizes[2:3], (0.2, 1.0))
    np.testing.assert_array_equal(together[:, 2:3], alone)
    assert (together != sample_boxes(2, 2, np.array([8, 3, 5, 1]), sizes, (0.2, 1.0))).any()
    assert (together[0] != together[1]).any()


def test_area_and_ratio_have_their_distributions() -> None:
    """In a square of 1,000 pixels nearly all first draws of up to half its area fit."""
    count = 20_000
    sizes = np.full((count, 2), 1000, dtype=np.int32)
    height, width = sample_boxes(0, 0, np.arange(count), sizes, (0.1, 0.5))[0, :, 2:].T.astype(float)
    area, log_ratio = height * width / 1e6, np.log(width / height)
    np.testing.assert_allclose(np.quantile(area, [0, 0.25, 0.5, 0.75, 1]), [0.1, 0.2, 0.3, 0.4, 0.5], atol=0.01)
    limit = math.log(4 / 3)
    quartiles = [-limit, -limit / 2, 0, limit / 2, limit]
    np.testing.assert_allclose(np.quantile(log_ratio, [0, 0.25, 0.5, 0.75, 1]), quartiles, atol=0.015)
    assert abs(np.corrcoef(area, log_ratio)[0, 1]) < 0.03


def test_torchvision_draws_from_the_same_distribution() -> None:
    """Means of top, left, height and width of 4,000 boxes in a wide image, where many first draws do not fit."""
    size, scale, ratio = (60, 200), (0.2, 1.0), [3 / 4, 4 / 3]
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    torchvisions = np.array([RandomResizedCrop.get_params(image, list(scale), ratio) for _ in range(4000)])
    ours = sample_boxes(0, 0, np.arange(4000), np.tile(np.array(size, np.int32), (4000, 1)), scale)[0]
    error = np.sqrt((ours.var(axis=0) + torchvisions.var(axis=0)) / 4000)
    assert (np.abs(ours.mean(axis=0) - torchvisions.mean(axis=0)) < 4.5 * error).all()
    np.testing.assert_allclose(ours.std(axis=0), torchvisions.std(axis=0), rtol=0.08)
