"""Applies parameter rows to crops with plain torch operations, on any device.

V views · S side · H, W sides of a plane · images are planar float32 (V, 3, S, S) in [0, 1] inside this file
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.augment import Augmentation, Column, Op, blur_taps
from pipelines.cpu_threads import side_by_side
from pipelines.transfer import to_device

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, in the digits that torchvision uses
# The most a group of views may take, so that on a CPU it stays in the second-level cache (1 MiB a core).
_GROUP_BYTES = 3 * 2**18


def apply(
    crops: Tensor,
    params: np.ndarray,
    augmentation: Augmentation,
    dtype: torch.dtype,
    source: np.ndarray | None = None,
) -> Tensor:
    """Crops to normalised views: colour jitter in each view's order, greyscale, blur, solarise, flip, normalise.

    crops   (N, S, S, 3) uint8, any strides
    params  (V, P) float32 on the host, columns as in `Column`
    source  (V,) which crop each view comes from; by default the one in its place
    Returns (V, 3, S, S) of `dtype`, channels-last in memory.
    """
    count, side = len(params), crops.shape[1]
    source = np.arange(count) if source is None else source
    out = torch.empty((count, side, side, 3), dtype=dtype, device=crops.device)
    mean, std = (torch.tensor(v, device=crops.device).view(1, 3, 1, 1) for v in (augmentation.mean, augmentation.std))

    def apply_to(rows: np.ndarray) -> None:
        index = to_device(rows, crops.device)
        images = crops[to_device(source[rows], crops.device)].permute(0, 3, 1, 2)
        images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        colour(images, params[rows], augmentation)
        images = images.sub_(mean).div_(std).permute(0, 2, 3, 1)
        out.index_copy_(0, index, images.to(dtype, memory_format=torch.contiguous_format))

    if crops.is_cuda:
        for rows in _groups(params, count):
            apply_to(rows)
    else:
        side_by_side(apply_to, _groups(params, max(1, _GROUP_BYTES // (3 * side * side * 4))))
    return out.permute(0, 3, 1, 2)


def colour(images: Tensor, params: np.ndarray, augmentation: Augmentation) -> None:
    """Everything but normalisation, in place, for views of one jitter order. images (V, 3, S, S) in [0, 1]."""
    grey = params[:, Column.GREY] != 0
    if augmentation.grey_first:
        _on_subset(images, grey, _to_grey)
    if _is_jittered(params).any():
        order = int(params[0, Column.ORDER])
        for place in range(4):
            op = Op((order >> (2 * place)) & 3)
            factor = to_device(params[:, Column.BRIGHTNESS + op], images.device).view(-1, 1, 1, 1)
            _JITTER[op](images, factor)
    if not augmentation.grey_first:
        _on_subset(images, grey, _to_grey)
    blurred = params[:, Column.BLUR_SIGMA] > 0
    sigma = to_device(params[blurred, Column.BLUR_SIGMA], images.device)
    taps = blur_taps(augmentation, images.shape[-1])
    _on_subset(images, blurred, lambda x: gaussian_blur(x, sigma, taps))
    _on_subset(images, params[:, Column.SOLARISE] != 0, lambda x: torch.where(x >= 0.5, 1 - x, x))
    _on_subset(images, params[:, Column.FLIP] != 0, lambda x: x.flip(-1))


def _groups(params: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Row numbers of views that share a jitter order (or have none), at most `most` at a time."""
    order = np.where(_is_jittered(params), params[:, Column.ORDER], -1.0)
    for value in np.unique(order):
        rows = np.flatnonzero(order == value)
        yield from (rows[start : start + most] for start in range(0, len(rows), most))


def _is_jittered(params: np.ndarray) -> np.ndarray:
    factors = params[:, Column.BRIGHTNESS : Column.HUE]
    return (factors != 1).any(axis=1) | (params[:, Column.HUE] != 0)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """clip(factor · x, 0, 1), in place."""
    return images.mul_(factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """clip(factor · x + (1 − factor) · mean luma, 0, 1), in place."""
    mean = luma(images).mean((-2, -1), keepdim=True)
    return torch.lerp(mean, images, factor, out=images).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """clip(factor · x + (1 − factor) · luma, 0, 1), in place."""
    return torch.lerp(luma(images), images, factor, out=images).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV by `shift` full circles, in place; value and saturation stay.

    With m = min, C = max − min and the hue h in [0, 6), the channels are m + C · clip(w, 0, 1) for
    w = |h − 3| − 1, 2 − |h − 2| and 2 − |h − 4| (Smith, "Color gamut transform pairs", 1978, in its closed form).
    """
    red, green, blue = images.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    scale = chroma.clamp_min(1e-12).reciprocal_()
    # Comparisons and `where` are an order of magnitude slower on a CPU than arithmetic, so the sector is weighed.
    is_red = torch.eq(largest, red).float()
    is_green = torch.eq(largest, green).float().mul_(1 - is_red)
    is_blue = 1 - is_red - is_green
    hue = (green - blue).mul_(is_red).addcmul_(blue - red, is_green).addcmul_(red - green, is_blue).mul_(scale)
    hue.add_(is_green, alpha=2).add_(is_blue, alpha=4)
    hue.add_(6 * shift.view(-1, 1, 1))
    hue.sub_((hue / 6).floor_(), alpha=6)  # remainder_ takes ten times as long
    for channel, (middle, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        wave = (hue - middle).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(smallest, wave, chroma, out=images[:, channel])
    return images


_JITTER = {
    Op.BRIGHTNESS: adjust_brightness,
    Op.CONTRAST: adjust_contrast,
    Op.SATURATION: adjust_saturation,
    Op.HUE: adjust_hue,
}


def luma(images: Tensor) -> Tensor:
    """(V, 3, H, W) to (V, 1, H, W): the weighted sum of the channels."""
    red, green, blue = images.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _to_grey(images: Tensor) -> Tensor:
    return luma(images).expand_as(images)


def gaussian_blur(images: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Separable Gaussian of a width of its own for every view, reflected at the border.

    images (V, 3, S, S), sigma (V,) pixels, taps an odd kernel width of at most 2·S − 1.
    """
    views, channels, height, width = images.shape
    radius = taps // 2
    x = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (x / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    planes = images.reshape(1, views * channels, height, width)
    planes = F.pad(planes, [radius] * 4, mode="reflect")
    planes = F.conv2d(planes, kernel[:, None, None, :], groups=views * channels)
    planes = F.conv2d(planes, kernel[:, None, :, None], groups=views * channels)
    return planes.view(images.shape)


def _on_subset(images: Tensor, chosen: np.ndarray, operation: Callable[[Tensor], Tensor]) -> None:
    """Replaces the chosen views by what the operation makes of them. `chosen` is on the host, so nothing waits."""
    if not chosen.any():
        return
    index = to_device(np.flatnonzero(chosen), images.device)
    images[index] = operation(images[index])
