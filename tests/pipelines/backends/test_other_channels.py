"""Views of one, two, four and more channels: the same on every pipeline that can make them, with what is defined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.augment import c_ops, torch_ops
from pipelines.augment.params import Column, blur_taps, sample_params
from pipelines.augment.presets import BYOL, V1, V2, Augmentation
from pipelines.backends.select import choose, open_pipeline, open_source
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError
from pipelines.plan.planner import Planner

CPU = torch.device("cpu")
SIDE = 24


def of(augmentation: Augmentation, channels: int) -> Augmentation:
    """As `fastmoco.config.augment.augmentation_of` makes it for other channels than three."""
    mean, std = (tuple(np.linspace(low, high, channels).tolist()) for low, high in ((0.3, 0.6), (0.2, 0.3)))
    return replace(augmentation, saturation=0.0, hue=0.0, grey_p=0.0, mean=mean, std=std)


def images(channels: int, height: int = 30, width: int = 40) -> ImageIndex:
    pixels = np.random.default_rng(channels).integers(0, 256, (12, height, width, channels), dtype=np.uint8)
    return ImageIndex.from_pixels("random", pixels)


def views(name: str, index: ImageIndex, augmentation: Augmentation) -> Tensor:
    """(24, C, S, S) of one step."""
    planner = Planner(index.sizes, seed=3, batch_size=12, augmentation=augmentation, shuffle_keys=False)
    source = open_source(name, index, SIDE, CPU, 0)
    pipeline = open_pipeline(name, index, planner, source, SIDE, CPU, torch.float32, 0)
    try:
        batch = next(iter(pipeline.views(0, 1)))
        return torch.cat([batch.query, batch.key])
    finally:
        pipeline.close()


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("size", [(30, 40), (80, 90)])  # cropped by matrix products, and one by one
def test_resident_and_torch_give_the_same_views(channels: int, size: tuple[int, int]):
    index, augmentation = images(channels, *size), of(BYOL, channels)
    resident, workers = (views(name, index, augmentation) for name in ("resident", "torch"))
    assert resident.shape == (24, channels, SIDE, SIDE)
    levels = (resident - workers).abs() * torch.tensor(augmentation.std).view(-1, 1, 1) * 255
    assert levels.mean() < 0.5  # crops may round to the next level, which contrast multiplies
    if size == (80, 90):
        assert torch.equal(resident, workers)


def test_a_channel_depends_on_no_other_but_through_the_mean_of_contrast():
    crops = torch.from_numpy(images(5, SIDE, SIDE).pixels)
    augmentation = replace(of(V2, 5), contrast=0.0, solarise_p=0.5)
    params = sample_params(0, 0, np.arange(12), augmentation)[0]
    together = torch_ops.apply(crops, params, augmentation, torch.float32)
    for channel in range(5):
        one = replace(augmentation, mean=augmentation.mean[channel : channel + 1], std=augmentation.std[channel:][:1])
        alone = torch_ops.apply(crops[..., channel : channel + 1], params, one, torch.float32)
        assert torch.equal(together[:, channel : channel + 1], alone)


@pytest.mark.parametrize("channels", [1, 4])
def test_every_operation_is_the_formula(channels: int):
    """Brightness, contrast with the mean of all channels, blur, solarisation and flips, written out for each view."""
    crops = torch.from_numpy(images(channels, SIDE, SIDE).pixels)
    augmentation = replace(of(BYOL, channels), solarise_p=0.5, vertical_flip_p=0.5)
    params = sample_params(1, 0, np.arange(12), augmentation)[0]
    actual = torch_ops.apply(crops, params, augmentation, torch.float32).double()
    for view, row in enumerate(params.astype(np.float64)):
        x = crops[view].permute(2, 0, 1).double() / 255
        for place in range(4):
            op = int(row[Column.ORDER]) >> (2 * place) & 3
            if op == 0:
                x = (x * row[Column.BRIGHTNESS]).clamp(0, 1)
            elif op == 1:
                x = (x * row[Column.CONTRAST] + x.mean() * (1 - row[Column.CONTRAST])).clamp(0, 1)
        if (sigma := row[Column.BLUR_SIGMA]) > 0:
            radius = blur_taps(augmentation, SIDE) // 2
            kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma) ** 2)
            kernel = (kernel / kernel.sum()).expand(channels, 1, 1, -1)
            x = F.conv2d(F.pad(x[None], [radius] * 4, mode="reflect"), kernel, groups=channels)
            x = F.conv2d(x, kernel.mT, groups=channels)[0]
        near = (x - 0.5).abs() < 1e-5  # where rounding decides
        if row[Column.SOLARISE]:
            x = torch.where(x >= 0.5, 1 - x, x)
        dims = [dim for dim, flip in ((2, row[Column.FLIP]), (1, row[Column.VERTICAL_FLIP])) if flip]
        x, near = x.flip(dims), near.flip(dims)
        mean, std = (torch.tensor(v).double().view(-1, 1, 1) for v in (augmentation.mean, augmentation.std))
        assert ((actual[view] - (x - mean) / std).abs()[~near] < 2e-5).all()


def test_three_channels_take_the_paths_they_took():
    """The compiled loop, bit for bit as torch, and luma with the weights of BT.601 rather than the mean."""
    crops = torch.from_numpy(images(3, SIDE, SIDE).pixels)
    params = sample_params(0, 0, np.arange(12), V1)[0]
    plain = torch_ops.apply(crops, params, V1, torch.float32)
    assert torch.equal(c_ops.apply(crops, params, V1, torch.float32), plain)
    pixel = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    assert torch_ops.luma(pixel).item() == pytest.approx(0.2989 + 0.587 / 2 + 0.114 / 4)
    assert torch_ops.luma(pixel[:, :2]).item() == 0.75


@pytest.mark.parametrize("name", ["dali", "ffcv", "dataloader"])
def test_pipelines_of_three_channels_are_refused_in_one_line(name: str):
    expected = f"--pipeline {name} reads images of three channels only, and --channels is 4: use --pipeline resident or"
    for use in (lambda: choose(name, images(4), CPU), lambda: open_source(name, images(4), SIDE, CPU, 0)):
        with pytest.raises(BackendMissingError, match=expected):
            use()
    assert choose("auto", images(4), CPU)[0] == "resident"
