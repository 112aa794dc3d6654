"""Views compared with torchvision's transforms at the same parameters, on float tensors and on PIL images.

B images · S side of a view in pixels
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms.v2 import CenterCrop, Compose, Resize
from torchvision.transforms.v2.functional import to_pil_image

from fastmoco.backbones.preprocessing import Preprocessing
from pipelines.augment.params import ORDERS, Column, Op, blur_taps, sample_params
from pipelines.augment.presets import AUGMENTATIONS, Augmentation
from pipelines.augment.torch_ops import apply

SIDE, IMAGES = 32, 96
JITTER = {
    Op.BRIGHTNESS: TF.adjust_brightness,
    Op.CONTRAST: TF.adjust_contrast,
    Op.SATURATION: TF.adjust_saturation,
    Op.HUE: TF.adjust_hue,
}


def crops() -> Tensor:
    """(B, S, S, 3) uint8: smooth shapes of random colours with some grain, as in photographs."""
    random = np.random.default_rng(5)
    coarse = torch.from_numpy(random.uniform(0, 255, (IMAGES, 3, 4, 4)))
    smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")
    grain = torch.from_numpy(random.normal(0, 6, (IMAGES, 3, SIDE, SIDE)))
    return (smooth + grain).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def views(augmentation: Augmentation) -> tuple[Tensor, np.ndarray, Augmentation]:
    """Our views (B, 3, S, S) in [0, 1] without normalisation, with their parameters."""
    plain = replace(augmentation, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    rows = sample_params(7, 2, np.arange(IMAGES), plain)[1]
    return apply(crops(), rows, plain, torch.float32), rows, plain


def torchvision_view(image, row: np.ndarray, augmentation: Augmentation, solarise_at: float):
    """One view of a (3, S, S) tensor in [0, 1], or of a PIL image, by torchvision's functions."""
    if row[Column.GREY] and augmentation.grey_first:
        image = TF.rgb_to_grayscale(image, 3)
    for position in range(4):
        op = Op((int(row[Column.ORDER]) >> 2 * position) & 3)
        image = JITTER[op](image, float(row[Column.BRIGHTNESS + op]))
    if row[Column.GREY] and not augmentation.grey_first:
        image = TF.rgb_to_grayscale(image, 3)
    if (sigma := float(row[Column.BLUR_SIGMA])) > 0:
        taps = blur_taps(augmentation, SIDE)
        image = TF.gaussian_blur(image, [taps, taps], [sigma, sigma])
    if row[Column.SOLARISE]:
        image = TF.solarize(image, solarise_at)
    return TF.horizontal_flip(image) if row[Column.FLIP] else image


def against_tensors() -> float:
    """The largest difference of a value in [0, 1], over all presets."""
    largest = 0.0
    for preset in AUGMENTATIONS.values():
        found, rows, own = views(preset)
        for view, crop, row in zip(found, crops(), rows, strict=True):
            expected = torchvision_view(crop.permute(2, 0, 1).float() / 255, row, own, 0.5)
            largest = max(largest, (view - expected).abs().max().item())
    return largest


def solarised_levels() -> int:
    """How many of the 256 levels PIL's solarisation at 128 maps to another than ours at one half."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3).contiguous()
    own = replace(AUGMENTATIONS["byol"], mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    row = np.zeros((1, len(Column)), dtype=np.float32)
    row[:, Column.BRIGHTNESS : Column.HUE] = row[:, Column.SOLARISE] = 1
    row[:, Column.ORDER] = ORDERS[0]
    found = (255 * apply(levels, row, own, torch.float32)[0]).round().permute(1, 2, 0)
    expected = np.asarray(TF.solarize(to_pil_image(levels[0].permute(2, 0, 1)), 128))
    return int((found.numpy() != expected)[..., 0].sum())


def standard_view() -> float:
    """The largest difference in levels of 255 from torchvision's Resize(256) and CenterCrop(224) of smooth images."""
    largest = 0.0
    for number, (height, width) in enumerate([(300, 500), (375, 281), (240, 1_000), (200, 200)]):
        coarse = torch.from_numpy(np.random.default_rng(number).uniform(0, 255, (1, 3, height // 8, width // 8)))
        image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="nearest")[0].to(torch.uint8)
        expected = Compose([Resize(256, antialias=True), CenterCrop(224)])(image)
        found = Preprocessing(224, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))(image)
        largest = max(largest, (found - expected).abs().max().item())
    return largest


def brighter_than_pil() -> float:
    """By how many levels of 255 our views are brighter on average, the most of all presets."""
    return max(_brighter(preset) for preset in AUGMENTATIONS.values())


def _brighter(preset: Augmentation) -> float:
    found, rows, own = views(preset)
    images = [to_pil_image(crop.permute(2, 0, 1)) for crop in crops()]
    expected = [torchvision_view(image, row, own, 128) for image, row in zip(images, rows, strict=True)]
    means = torch.tensor([np.asarray(image).mean() for image in expected])
    return (255 * found.mean((1, 2, 3)) - means).mean().item()
