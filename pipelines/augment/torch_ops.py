"""Applies parameter rows to crops with plain torch operations, on any device.

V views · S side · H, W sides of a plane · images are planar float32 (V, 3, S, S) in [0, 1] inside this file
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.augment.params import Column, Op, blur_taps
from pipelines.augment.presets import Augmentation
from pipelines.cpu_threads import parallel_for
from pipelines.transfer import to_device

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, in the digits that torchvision uses
# Upper limit of a group of views. Its planes exceed a second-level cache of 2 MiB, in which most operations take half
# the time; but with smaller groups threads lose more than that waiting for the interpreter lock.
_GROUP_BYTES = 6 * 2**20


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
    source  (V,) which crop each view comes from; by default crop v for view v
    Returns (V, 3, S, S) of `dtype`, channels-last in memory.
    """
    count, side = len(params), crops.shape[1]
    source = np.arange(count) if source is None else source
    out = torch.empty((count, side, side, 3), dtype=dtype, device=crops.device)
    mean, std = (torch.tensor(v, device=crops.device).view(1, 3, 1, 1) for v in (augmentation.mean, augmentation.std))
    scale, offset = 1 / std, -mean / std
    gather = _Gather(crops)

    def apply_to(rows: np.ndarray) -> None:
        images = gather(source[rows], params[rows, Column.FLIP] != 0)
        colour(images, params[rows], augmentation)
        images = images.mul_(scale).add_(offset).to(dtype).permute(0, 2, 3, 1)  # while planar: three times as fast
        _assign_rows(out, rows, images)

    if crops.is_cuda:
        for rows in _groups(params, count):
            apply_to(rows)
    else:
        parallel_for(apply_to, _groups(params, max(1, _GROUP_BYTES // (3 * side * side * 4))))
    return out.permute(0, 3, 1, 2)


class _Gather:
    """Gathers crops (N, S, S, 3) uint8 of any strides as float32 planes (V, 3, S, S) in [0, 1]."""

    def __init__(self, crops: Tensor) -> None:
        # Axes in memory order, so that each crop is one contiguous copy.
        axes = sorted((1, 2, 3), key=crops.stride, reverse=True)
        stored = crops.permute(0, *axes)
        self._shape, self._rows = stored.shape[1:], stored.flatten(1)
        self._planes = [1 + axes.index(axis) for axis in (3, 1, 2)]  # axes of channels, height and width

    def __call__(self, index: np.ndarray, flipped: np.ndarray) -> Tensor:
        """index (V,) of the crops, flipped (V,) whether to flip each horizontally, which is cheaper on bytes."""
        chosen = self._rows.index_select(0, to_device(index, self._rows.device)).view(-1, *self._shape)
        _on_subset(chosen, flipped, lambda x: x.flip(self._planes[2]))
        return chosen.permute(0, *self._planes).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)


def colour(images: Tensor, params: np.ndarray, augmentation: Augmentation) -> None:
    """All but flip and normalisation, in place. images (V, 3, S, S), of which all or none are jittered."""
    grey = params[:, Column.GREY] != 0
    if augmentation.grey_first:
        _on_subset(images, grey, _to_grey)
    if _is_jittered(params).any():
        factors = to_device(params[:, Column.BRIGHTNESS : Column.HUE + 1], images.device).view(-1, 4, 1, 1, 1)
        for op in _op_order(params):
            changes = np.flatnonzero(np.diff(op)) + 1
            for start, stop in itertools.pairwise([0, *changes.tolist(), len(op)]):
                _JITTER[op[start]](images[start:stop], factors[start:stop, op[start]])
    if not augmentation.grey_first:
        _on_subset(images, grey, _to_grey)
    sigma, taps = params[:, Column.BLUR_SIGMA], blur_taps(augmentation, images.shape[-1])
    if images.is_cuda:
        widths = to_device(sigma[sigma > 0], images.device)
        _on_subset(images, sigma > 0, lambda x: blur_grouped_conv(x, widths, taps))
    else:
        blur_band_matrices(images, sigma, taps)
    _on_subset(images, params[:, Column.SOLARISE] != 0, lambda x: torch.where(x >= 0.5, 1 - x, x))


def _groups(params: np.ndarray, max_views: int) -> Iterator[np.ndarray]:
    """Row numbers of up to `max_views` views that are not jittered, or have hue at the same position in their order.

    Hue takes longest and is applied to a whole group at once. Within a group, views are sorted by their operations, so
    that the other operations take few calls as well.
    """
    order = _op_order(params)
    hue_position = np.where(_is_jittered(params), (order == Op.HUE).argmax(axis=0), -1)
    rows = np.lexsort((*reversed(order), hue_position))
    for group in np.split(rows, np.flatnonzero(np.diff(hue_position[rows])) + 1):
        yield from (group[start : start + max_views] for start in range(0, len(group), max_views))


def _op_order(params: np.ndarray) -> np.ndarray:
    """(V, P) to (4, V): each view's first operation, its second, and so on, as in `Op`."""
    return (params[:, Column.ORDER].astype(np.int64) >> np.arange(0, 8, 2)[:, None]) & 3


def _is_jittered(params: np.ndarray) -> np.ndarray:
    factors = params[:, Column.BRIGHTNESS : Column.HUE]
    return (factors != 1).any(axis=1) | (params[:, Column.HUE] != 0)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """clip(factor · x, 0, 1), in place."""
    return images.mul_(factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """clip(factor · x + (1 − factor) · mean luma, 0, 1), in place."""
    mean = luma(images.mean((-2, -1), keepdim=True))
    return images.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)  # `lerp` is slow with one mean per view


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """clip(factor · x + (1 − factor) · luma, 0, 1), in place."""
    return torch.lerp(luma(images), images, factor, out=images).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotates the HSV hue by `shift` full circles, in place; value and saturation stay.

    With m = min, C = max − min and a circle of length 6, a channel is m + C · clip(d − 1, 0, 1). Here d is the distance
    along the circle from the hue opposite the channel's own (3, 5 and 7) to the pixel's: d = 3 − ||y| − 3| for a
    difference y of at most one circle (after Smith, "Color gamut transform pairs", 1978). The hue itself needs no case
    distinction: it has the sign of g − b and the magnitude 1 + (g + b − r − m) / C, from 0 to 3.
    """
    red, green, blue = images.unbind(1)
    largest = torch.maximum(red, green)
    largest = torch.maximum(largest, blue, out=largest)
    smallest = torch.minimum(red, green)
    smallest = torch.minimum(smallest, blue, out=smallest)
    chroma = largest.sub_(smallest)
    sign, hue = green - blue, (green + blue).sub_(red).sub_(smallest)
    hue.div_(chroma.clamp_min(1e-12)).add_(1).copysign_(sign)
    opposite = 6 * shift.view(-1, 1, 1, 1) - torch.tensor([3.0, 5.0, 7.0], device=images.device).view(3, 1, 1)
    opposite.sub_((opposite / 6).round_(), alpha=6)  # within half a circle, so that the sum below is within one
    wave = torch.add(hue.unsqueeze_(1), opposite, out=images).abs_().sub_(3).abs_().clamp_(1, 2)
    highest = smallest.add_(chroma, alpha=2).unsqueeze_(1)
    return torch.sub(highest, wave.mul_(chroma.unsqueeze_(1)), out=images)


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


def blur_grouped_conv(images: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Separable Gaussian blur, one sigma per view, reflected at the border, as two grouped convolutions.

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


def blur_band_matrices(images: Tensor, sigma: np.ndarray, taps: int) -> None:
    """The same blur of all views with sigma > 0, in place, as matrix products: on a CPU a fifth of the time.

    A band matrix maps a window of the padded row to a segment of the blurred row, and its transpose does the same for a
    column; all segments of a view share one matrix.
    """
    side, radius, rows = images.shape[-1], taps // 2, np.flatnonzero(sigma)
    segment = max((d for d in range(8, 49) if side % d == 0), default=side)
    window, segments, padded_side = segment + 2 * radius, side // segment, side + 2 * radius
    for row, band in zip(rows.tolist(), _bands(sigma[rows], radius, segment), strict=True):
        image = images[row]
        padded = F.pad(image, [radius] * 4, mode="reflect")
        windows = padded.as_strided((segments, 3 * padded_side, window), (segment, padded_side, 1))
        tall = image.new_empty((3, padded_side, side))
        torch.bmm(windows, band.T.expand(segments, -1, -1), out=tall.view(-1, segments, segment).transpose(0, 1))
        for plane, blurred in zip(tall.unbind(), image.unbind(), strict=True):
            windows = plane.as_strided((segments, window, side), (segment * side, side, 1), plane.storage_offset())
            torch.bmm(band.expand(segments, -1, -1), windows, out=blurred.view(segments, segment, side))


def _bands(sigma: np.ndarray, radius: int, segment: int) -> Tensor:
    """(V,) → (V, segment, segment + 2·radius): row i holds the Gaussian's 2·radius + 1 weights from column i on."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma[:, None]) ** 2)
    weights[weights < np.finfo(np.float32).eps] = 0  # avoids denormal numbers, which make a CPU ten times as slow
    bands = np.zeros((len(sigma), segment, segment + 2 * radius), np.float32)
    rows, taps = np.arange(segment)[:, None], np.arange(2 * radius + 1)
    bands[:, rows, rows + taps] = (weights / weights.sum(1, keepdims=True))[:, None]
    return torch.from_numpy(bands)


def _on_subset(images: Tensor, chosen: np.ndarray, operation: Callable[[Tensor], Tensor]) -> None:
    """Applies the operation to the chosen views. `chosen` is on the host, so the device is not synchronised."""
    rows = np.flatnonzero(chosen)
    if rows.size:
        _assign_rows(images, rows, operation(images.index_select(0, to_device(rows, images.device))))


def _assign_rows(images: Tensor, rows: np.ndarray, values: Tensor) -> None:
    """images[rows] = values. On a CPU one call copies whole views: half the time of indexing, which copies pixels."""
    if images.is_cuda:
        images.index_copy_(0, to_device(rows, images.device), values)  # one launch for all views
    else:
        torch._foreach_copy_([images[row] for row in rows.tolist()], list(values.unbind()))
