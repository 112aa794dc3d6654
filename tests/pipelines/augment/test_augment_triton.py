"""Triton augmentation against plain torch on the same parameters; its crops and its blur also against float64."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.augment import torch_ops
from pipelines.augment.params import ORDERS, Column, Op, blur_taps, sample_params
from pipelines.augment.presets import BYOL, CIFAR, V1, V2, Augmentation
from tests import reference_crops
from tests.reference_crops import batched_crops

pytestmark = [pytest.mark.any_device, pytest.mark.usefixtures("poisoned_memory")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOLARISING = replace(V2, name="solarising", solarise_p=0.5, blur_p=0.6)
TURNED = replace(V2, name="turned", flip_p=0.3, vertical_flip_p=0.5, mean=(0.1, 0.5, 0.9), std=(1.0, 0.2, 0.1))


@pytest.fixture
def fused(require_backend: Callable[[str], None]) -> ModuleType:
    require_backend("triton")
    from pipelines.augment import triton_ops

    return triton_ops


@pytest.fixture
def resample(require_backend: Callable[[str], None]) -> ModuleType:
    require_backend("triton")
    from pipelines.augment import resample_triton

    return resample_triton


def random_crops(count: int, side: int) -> Tensor:
    """Photograph-like: a smooth gradient of a colour of its own, some noise, and flat white and black corners."""
    ramp = torch.linspace(0, 1, side)
    smooth = ramp[:, None, None] * torch.rand(count, 1, 1, 3) + ramp[None, :, None] * torch.rand(count, 1, 1, 3)
    images = (110 * smooth + 35 * torch.rand(count, side, side, 3)).to(torch.uint8)
    images[:, : side // 4, : side // 4] = 255
    images[:, side // 2 :, -1:] = 0
    return images


def random_params(count: int, augmentation: Augmentation) -> np.ndarray:
    """Fresh rows, among them every order of the operations where there are enough."""
    seed = int(torch.randint(2**31, ()))
    rows = sample_params(seed, 0, np.arange(count), augmentation)[0]
    rows[:, Column.ORDER] = np.resize(np.random.default_rng(seed).permutation(ORDERS), count)
    return rows


def reference(
    crops: Tensor, params: np.ndarray, augmentation: Augmentation, dtype: torch.dtype, source: np.ndarray | None = None
) -> Tensor:
    return torch_ops.apply(crops.cpu(), params, augmentation, dtype, source)


@pytest.mark.parametrize("augmentation", [V1, V2, CIFAR, BYOL, SOLARISING, TURNED], ids=lambda a: a.name)
@pytest.mark.parametrize(("count", "side"), [(24, 8), (5, 17), (2, 70)], ids=["orders", "ragged", "tiles"])
def test_equals_plain_torch(fused: ModuleType, augmentation: Augmentation, count: int, side: int) -> None:
    crops, params = random_crops(count, side), random_params(count, augmentation)
    expected = reference(crops, params, augmentation, torch.float32)
    actual = fused.apply(crops.to(DEVICE), torch.from_numpy(params).to(DEVICE), augmentation, torch.float32)
    assert actual.shape == (count, 3, side, side)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("augmentation", [CIFAR, V2, TURNED], ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_writes_the_training_dtype(fused: ModuleType, augmentation: Augmentation, dtype: torch.dtype) -> None:
    """Rounded once; blurred views also twice to fp16 on the way, each time by at most 2^-12 before normalisation."""
    crops, params = random_crops(8, 12), random_params(8, augmentation)
    actual = fused.apply(crops.to(DEVICE), torch.from_numpy(params).to(DEVICE), augmentation, dtype)
    expected = reference(crops, params, augmentation, torch.float32)
    assert actual.dtype == dtype
    planes = 2 * 2**-12 / torch.tensor(augmentation.std).view(3, 1, 1)
    planes = planes * torch.from_numpy(params[:, Column.BLUR_SIGMA] > 0).view(-1, 1, 1, 1)
    difference = (actual.float().cpu() - expected).abs()
    assert (difference <= 2 * torch.finfo(dtype).eps * expected.abs() + 1e-4 + planes).all()


def unchanging_params(count: int) -> np.ndarray:
    """Rows of parameters that leave their views as they are."""
    params = np.zeros((count, len(Column)), dtype=np.float32)
    params[:, [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1
    params[:, Column.ORDER] = ORDERS[5]
    return params


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float16, 3 * 2**-12)], ids=str)
@pytest.mark.parametrize(("widest", "side"), [(2.0, 33), (6.0, 22), (6.0, 5)], ids=["usual", "wide", "border"])
def test_blur_equals_float64(fused: ModuleType, widest: float, side: int, dtype: torch.dtype, atol: float) -> None:
    """Taps left out for small sigma weigh less than rounding; fp16 planes and an fp16 view each round by 2^-12."""
    recipe = replace(V2, blur_sigma=(0.05, widest), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    sigmas, radius = np.geomspace(0.05, widest, 4), blur_taps(recipe, side) // 2
    params, crops = unchanging_params(len(sigmas)), torch.randint(256, (len(sigmas), side, side, 3), dtype=torch.uint8)
    params[:, Column.BLUR_SIGMA] = sigmas
    actual = fused.apply(crops.to(DEVICE), torch.from_numpy(params).to(DEVICE), recipe, dtype)
    for view, sigma in enumerate(params[:, Column.BLUR_SIGMA].astype(float)):
        band, taps = np.zeros((side, side)), np.arange(-radius, radius + 1)
        weights = np.exp(-0.5 * (taps / sigma) ** 2)
        for row in range(side):
            reflected = side - 1 - np.abs(side - 1 - np.abs(row + taps))
            np.add.at(band[row], reflected, weights / weights.sum())
        exact = np.einsum("ij,jkc,lk->cil", band, crops[view].numpy() / 255, band)
        np.testing.assert_allclose(actual[view].double().cpu(), exact, rtol=0, atol=atol)


def test_hue_equals_hsv(fused: ModuleType) -> None:
    """Every colour of three levels, among them greys and ties of channels, by shifts of up to half a circle."""
    recipe = replace(V1, hue=0.5, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    levels = torch.tensor([0, 100, 255], dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels)
    crops = colours[torch.arange(36) % 27].view(1, 6, 6, 3).expand(9, -1, -1, -1)
    params = unchanging_params(9)
    params[:, Column.BRIGHTNESS + Op.HUE] = np.linspace(-0.5, 0.5, 9)
    actual = fused.apply(crops.to(DEVICE), torch.from_numpy(params).to(DEVICE), recipe, torch.float32)
    actual = actual.permute(0, 2, 3, 1).reshape(9, 36, 3).cpu().numpy()
    for view, pixel in np.ndindex(9, 27):
        hue, saturation, value = colorsys.rgb_to_hsv(*(colours[pixel] / 255).tolist())
        shifted = colorsys.hsv_to_rgb((hue + params[view, Column.HUE]) % 1, saturation, value)
        np.testing.assert_allclose(actual[view, pixel], shifted, rtol=0, atol=3e-6)


def test_source_and_crops_of_any_strides(fused: ModuleType) -> None:
    crops, params = random_crops(5, 9), random_params(7, CIFAR)
    source = np.array([4, 0, 0, 3, 2, 1, 4])
    strided = crops.to(DEVICE).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)  # the layout of crop_resize
    rows = torch.from_numpy(source).to(DEVICE)
    actual = fused.apply(strided, torch.from_numpy(params).to(DEVICE), CIFAR, torch.float32, rows)
    expected = reference(crops, params, CIFAR, torch.float32, source)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=3e-5)


def test_a_row_that_changes_nothing_only_normalises(fused: ModuleType) -> None:
    crops = random_crops(2, 6)
    actual = fused.apply(crops.to(DEVICE), torch.from_numpy(unchanging_params(2)).to(DEVICE), V2, torch.float32).cpu()
    mean, std = torch.tensor(V2.mean), torch.tensor(V2.std)
    expected = ((crops / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


def boxes_in(sizes: Tensor, smallest: int = 1) -> Tensor:
    """(V, 4) random boxes: the first is the whole image, the second a square of side `smallest`."""
    boxes = []
    for row, (height, width) in enumerate(sizes.tolist()):
        h, w = (int(torch.randint(smallest, n + 1, ())) for n in (height, width))
        h, w = ((height, width), (smallest, smallest), (h, w))[min(row, 2)]
        boxes.append([int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ())), h, w])
    return torch.tensor(boxes, dtype=torch.int32)


def uniform(resample: ModuleType, images: Tensor, planar: bool = True) -> object:
    """(N, H, 3, W) uint8 as the `ResidentPixels` of images of one size, planar or interleaved."""
    count, height, _, width = images.shape
    offsets = torch.arange(count) * (3 * height * width)
    sizes = torch.tensor([[height, width]] * count, dtype=torch.int32)
    pixels = images if planar else images.permute(0, 1, 3, 2).flatten()
    return resample.ResidentPixels(pixels.to(DEVICE), offsets.to(DEVICE), sizes.to(DEVICE), planar=planar)


def assert_equal_levels(actual: Tensor, image: Tensor, box: Tensor) -> None:
    """The nearest level to the exact sum of (H, 3, W) uint8 pixels; either of two if it is half-way between them.

    `crop_resize` is held to the same bound, so that two implementations differ by a level at most, and only there.
    """
    exact = reference_crops.reference(image.permute(0, 2, 1).numpy(), box.numpy(), actual.shape[1])
    assert np.abs(actual.cpu().numpy() - exact).max() <= 0.501
    (expected,) = batched_crops(image[None].contiguous(), box.view(1, 1, 4), actual.shape[1])[0]
    assert (actual.cpu().int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("planar", [True, False], ids=["planar", "interleaved"])
@pytest.mark.parametrize(("height", "width", "side"), [(32, 32, 32), (40, 25, 12), (9, 13, 33), (40, 70, 16)])
def test_crops_equal_crop_resize(resample: ModuleType, height: int, width: int, side: int, planar: bool) -> None:
    images = torch.randint(256, (6, height, 3, width), dtype=torch.uint8)
    boxes = boxes_in(torch.tensor([[height, width]] * 6))
    resident = uniform(resample, images, planar)
    actual = resample.crop(resident, boxes.to(DEVICE), side, torch.arange(6, device=DEVICE))
    assert actual.shape == (6, side, side, 3)
    for crop, image, box in zip(actual, images, boxes, strict=True):
        assert_equal_levels(crop, image, box)


def test_crops_of_images_of_different_sizes(resample: ModuleType) -> None:
    sizes = torch.tensor([[20, 31], [7, 50], [64, 9], [33, 33]], dtype=torch.int32)
    images = [torch.randint(256, (h, w, 3), dtype=torch.uint8) for h, w in sizes.tolist()]
    source = torch.tensor([2, 0, 3, 3, 1])
    boxes = boxes_in(sizes[source])
    offsets = torch.tensor([0, *np.cumsum([i.numel() for i in images])[:-1].tolist()])
    flat = torch.cat([image.flatten() for image in images])
    resident = resample.ResidentPixels(flat.to(DEVICE), offsets.to(DEVICE), sizes.to(DEVICE), planar=False)
    actual = resample.crop(resident, boxes.to(DEVICE), 14, source.to(DEVICE))
    for row, image in enumerate(source.tolist()):
        assert_equal_levels(actual[row], images[image].permute(0, 2, 1), boxes[row])


@pytest.mark.parametrize("planar", [True, False], ids=["planar", "interleaved"])
@pytest.mark.parametrize(
    ("augmentation", "side"), [(CIFAR, 16), (V2, 16), (V1, 40), (TURNED, 16)], ids=["one", "blur", "staged", "turned"]
)
def test_one_kernel_equals_crop_then_colour(
    fused: ModuleType, resample: ModuleType, augmentation: Augmentation, side: int, planar: bool
) -> None:
    images = torch.randint(256, (4, 21, 3, 18), dtype=torch.uint8)
    resident = uniform(resample, images, planar)
    params = torch.from_numpy(random_params(6, augmentation)).to(DEVICE)
    source = torch.tensor([3, 0, 1, 1, 2, 0])
    boxes = boxes_in(torch.tensor([[21, 18]] * 6)).to(DEVICE)
    source = source.to(DEVICE)
    actual = fused.crop_and_apply(resident, boxes, params, augmentation, side, torch.float32, source)
    crops = resample.crop(resident, boxes, side, source)
    torch.testing.assert_close(actual, fused.apply(crops, params, augmentation, torch.float32), rtol=0, atol=2e-6)
    expected = reference(crops, params.cpu().numpy(), augmentation, torch.float32)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=3e-5)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph_with_other_parameters(fused: ModuleType, resample: ModuleType) -> None:
    images = torch.randint(256, (64, 32, 3, 32), dtype=torch.uint8)
    resident, source = uniform(resample, images), torch.arange(64, device=DEVICE)
    boxes, params = boxes_in(torch.tensor([[32, 32]] * 64)).to(DEVICE), random_params(64, SOLARISING)
    on_device = torch.from_numpy(params).to(DEVICE)

    def views() -> Tensor:
        return fused.crop_and_apply(resident, boxes, on_device, SOLARISING, 32, torch.float32, source)

    views()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = views()
    params = random_params(64, SOLARISING)
    on_device.copy_(torch.from_numpy(params))
    graph.replay()
    crops = resample.crop(resident, boxes, 32, source)
    torch.testing.assert_close(actual.cpu(), reference(crops, params, SOLARISING, torch.float32), rtol=0, atol=3e-5)


@pytest.mark.parametrize("augmentation", [CIFAR, V2], ids=lambda a: a.name)
def test_an_earlier_result_is_overwritten(fused: ModuleType, resample: ModuleType, augmentation: Augmentation) -> None:
    """By every implementation, and by nothing but the new views."""
    images = torch.randint(256, (4, 21, 3, 18), dtype=torch.uint8)
    boxes, source = boxes_in(torch.tensor([[21, 18]] * 6)).to(DEVICE), torch.tensor([3, 0, 1, 1, 2, 0], device=DEVICE)
    crops, params = random_crops(6, 12).to(DEVICE), random_params(6, augmentation)
    on_device, resident = torch.from_numpy(params).to(DEVICE), uniform(resample, images)

    def three(out: list[Tensor | None]) -> list[Tensor]:
        return [
            torch_ops.apply(crops, params, augmentation, torch.bfloat16, out=out[0]),
            fused.apply(crops, on_device, augmentation, torch.bfloat16, out=out[1]),
            fused.crop_and_apply(resident, boxes, on_device, augmentation, 12, torch.bfloat16, source, out[2]),
        ]

    expected = three([None] * 3)
    memory: list[Tensor | None] = [torch.full_like(views, float("nan")) for views in expected]
    for views, wanted, given in zip(three(memory), expected, memory, strict=True):
        assert views is given
        assert torch.equal(views, wanted)
