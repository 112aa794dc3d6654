"""Crop and resize against a float64 loop and against torch's antialiased interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.augment.resample import filter_matrix
from pipelines.augment.resize import resize_box
from tests.reference_crops import batched_crops


def weights(start: int, length: int, source: int, side: int) -> np.ndarray:
    """(side, source) float64, pixel by pixel: the triangle filter as Pillow describes it."""
    scale = length / side
    reach = max(scale, 1.0)
    out = np.zeros((side, source))
    for o in range(side):
        centre = start + (o + 0.5) * scale
        for pixel in range(start, start + length):
            out[o, pixel] = max(0.0, 1 - abs(pixel + 0.5 - centre) / reach)
    return out / out.sum(axis=1, keepdims=True)


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_filter_matrix_equals_the_loop(data: st.DataObject) -> None:
    """Any interval of any axis, to any side: enlarged, reduced and unchanged."""
    source, side = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 40))
    start = data.draw(st.integers(0, source - 1))
    length = data.draw(st.integers(1, source - start))
    actual = filter_matrix(torch.tensor([start]), torch.tensor([length]), source, side)
    assert actual.shape == (1, side, source)
    np.testing.assert_allclose(actual[0].numpy(), weights(start, length, source, side), atol=2e-5)


def test_filter_matrix_of_a_large_photograph() -> None:
    """float32 is accurate enough at 6,000 pixels too."""
    actual = filter_matrix(torch.tensor([1234]), torch.tensor([4700]), 6000, 4)[0].numpy()
    np.testing.assert_allclose(actual, weights(1234, 4700, 6000, 4), atol=1e-6)


def test_rows_sum_to_one_and_stay_inside_the_interval() -> None:
    start, length = torch.tensor([0, 5, 31]), torch.tensor([32, 9, 1])
    matrix = filter_matrix(start, length, 32, 16)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(3, 16))
    for view in range(3):
        outside = [i for i in range(32) if not start[view] <= i < start[view] + length[view]]
        assert (matrix[view][:, outside] == 0).all()


BOXES = [
    [0, 0, 40, 56],  # the whole image
    [3, 5, 31, 37],  # reduced
    [10, 20, 8, 9],  # enlarged
    [7, 11, 16, 16],  # unchanged
    [39, 55, 1, 1],  # one pixel, in the last corner
    [0, 0, 1, 56],  # one row
    [0, 55, 40, 1],  # one column
]


@pytest.mark.parametrize("views", [1, 2])
def test_crop_resize_equals_the_loop(views: int) -> None:
    images = noise(len(BOXES), 40, 56, 3)
    boxes = torch.tensor([BOXES, BOXES[::-1]][:views], dtype=torch.int32)
    actual = batched_crops(images.permute(0, 1, 3, 2).contiguous(), boxes, 16)
    assert actual.shape == (views, len(BOXES), 16, 16, 3)
    assert actual.dtype == torch.uint8
    for view, row in np.ndindex(views, len(BOXES)):
        top, left, height, width = boxes[view, row].tolist()
        rows, columns = weights(top, height, 40, 16), weights(left, width, 56, 16)
        exact = np.einsum("ij,jkc,lk->ilc", rows, images[row].numpy().astype(float), columns)
        assert np.abs(actual[view, row].numpy() - exact).max() <= 0.501, boxes[view, row]


@pytest.mark.parametrize("box", BOXES, ids=str)
def test_both_crops_equal_torch_interpolation(box: list[int]) -> None:
    """The batched products round once; torch's uint8 kernel also rounds between the axes."""
    image = noise(40, 56, 3)
    top, left, height, width = box
    region = image[top : top + height, left : left + width].permute(2, 0, 1)[None].double()
    exact = F.interpolate(region, size=(16, 16), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    (batched,) = batched_crops(image.permute(0, 2, 1)[None].contiguous(), torch.tensor([[box]]), 16)[0]
    assert (batched - exact).abs().max() <= 0.501
    alone = torch.empty((16, 16, 3), dtype=torch.uint8)
    resize_box(image, box, alone)
    assert (alone - exact).abs().max() <= 1.01


def test_a_crop_equals_pillow() -> None:
    image = noise(40, 56, 3)
    cropped = Image.fromarray(image.numpy()).crop((5, 3, 42, 34))
    pillow = cropped.resize((16, 16), Image.Resampling.BILINEAR)
    (actual,) = batched_crops(image.permute(0, 2, 1)[None].contiguous(), torch.tensor([[[3, 5, 31, 37]]]), 16)[0]
    assert np.abs(actual.numpy().astype(int) - np.asarray(pillow)).max() <= 1


def test_a_constant_image_stays_constant_and_one_pixel_fills_the_crop() -> None:
    flat = torch.full((1, 9, 3, 11), 255, dtype=torch.uint8)
    assert (batched_crops(flat, torch.tensor([[[2, 3, 5, 7]]]), 32) == 255).all()
    image = noise(1, 9, 3, 11)
    crop = batched_crops(image, torch.tensor([[[4, 6, 1, 1]]]), 8)[0, 0]
    assert (crop == image[0, 4, :, 6]).all()
