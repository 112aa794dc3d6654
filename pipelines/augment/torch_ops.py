"""Applies parameter rows to crops with plain torch operations, on any device.

On a CPU this is the twin of the compiled loop (`augment.c_ops`): the results are the same bits, on any processor and
whatever else is in the batch. Therefore nothing here fuses a product with a sum, as `lerp` or `add(alpha=)` would, and
the only sum over pixels is one of integers.

With other channels than three, saturation, hue and greyscale are not defined and left out, and the luma in the contrast
is the mean of the channels.

V views · C channels · S side · H, W sides of a plane · images are planar float32 (V, C, S, S) in [0, 1] in this file
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.augment.params import Column, Op, blur_taps
from pipelines.augment.presets import Augmentation
from pipelines.cpu_threads import parallel_for
from pipelines.transfer import to_device_at_once

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, in the digits that torchvision uses
_LUMA_LEVELS = 2.0**24  # of the mean
# Upper limit of a group of views. Its planes exceed a second-level cache of 2 MiB, in which most operations take half
# the time; but with smaller groups threads lose more than that waiting for the interpreter lock.
_GROUP_BYTES = 6 * 2**20
_BLURRED_BYTES = 600 * 2**10  # likewise of the views that are blurred together: one of 224 pixels


def apply(
    crops: Tensor,
    params: np.ndarray,
    augmentation: Augmentation,
    dtype: torch.dtype,
    source: np.ndarray | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Crops to normalised views: colour jitter in each view's order, greyscale, blur, solarise, flips, normalise.

    crops   (N, S, S, C) uint8, any strides
    params  (V, P) float32 on the host, columns as in `Column`
    source  (V,) which crop each view comes from; by default crop v for view v
    out     an earlier result of the same shape and type, which is overwritten
    Returns (V, C, S, S) of `dtype`, channels-last in memory. On CUDA there is one copy from the host, and no wait.
    """
    count, side, channels, device = len(params), crops.shape[1], crops.shape[3], crops.device
    source = np.arange(count) if source is None else source
    if out is None:
        out = torch.empty((count, side, side, channels), dtype=dtype, device=device).permute(0, 3, 1, 2)
    views, gather = out.permute(0, 2, 3, 1), _Gather(crops)
    max_views = count if crops.is_cuda else max(1, _GROUP_BYTES // (channels * side * side * 4))
    groups, (scale, offset) = groups_on_device(params, source, max_views, device, normalisation(augmentation))
    scale, offset = scale.view(channels, 1, 1), offset.view(channels, 1, 1)

    def apply_to(group: Group) -> None:
        images = gather(group.source, group.flipped, group.upside_down)
        colour(images, group, augmentation)
        images = images.mul_(scale).add_(offset).to(dtype).permute(0, 2, 3, 1)  # while planar: three times as fast
        _assign_rows(views, group.rows, images)

    if crops.is_cuda:
        for group in groups:
            apply_to(group)
    else:
        parallel_for(apply_to, groups)
    return out


def normalisation(augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of each channel, (C,) float32."""
    mean, std = (np.array(values, dtype=np.float32) for values in (augmentation.mean, augmentation.std))
    return 1 / std, -mean / std


class _Gather:
    """Gathers crops (N, S, S, C) uint8 of any strides as float32 planes (V, C, S, S) in [0, 1]."""

    def __init__(self, crops: Tensor) -> None:
        # Axes in memory order, so that each crop is one contiguous copy.
        axes = sorted((1, 2, 3), key=crops.stride, reverse=True)
        stored = crops.permute(0, *axes)
        self._shape, self._rows = stored.shape[1:], stored.flatten(1)
        self._planes = [1 + axes.index(axis) for axis in (3, 1, 2)]  # axes of channels, height and width

    def __call__(self, index: Tensor, flipped: Tensor, upside_down: Tensor) -> Tensor:
        """index (V,) of the crops; flipped and upside_down (n,) rows to flip horizontally and vertically.

        Flips are cheaper on bytes.
        """
        chosen = self._rows.index_select(0, index).view(-1, *self._shape)
        _on_rows(chosen, flipped, lambda x: x.flip(self._planes[2]))
        _on_rows(chosen, upside_down, lambda x: x.flip(self._planes[1]))
        return chosen.permute(0, *self._planes).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)


class Group(NamedTuple):
    """Up to `max_views` views that are not jittered, or have hue at the same position in their order.

    Hue takes longest and is applied to a whole group at once. Within a group, views are sorted by their operations, so
    that the other operations take few calls as well.

    rows, source         (V,) int64, the views' positions in the batch, and the crops they come from
    flipped, upside_down, grey, blurred, solarised
                         (n,) int64, which of the V views, at positions in the group
    sigma                (n,) float32, of the blurred views
    factors              (V, 4, 1, 1, 1) float32, in the order of `Op`
    jitter               the operations in order, as (operation, first, last + 1 of the V views)
    """

    rows: Tensor
    source: Tensor
    flipped: Tensor
    upside_down: Tensor
    grey: Tensor
    blurred: Tensor
    solarised: Tensor
    sigma: Tensor
    factors: Tensor
    jitter: list[tuple[Op, int, int]]


_ARRAYS = len(Group._fields) - 1  # all but the jitter


def groups_on_device(
    params: np.ndarray,
    source: np.ndarray,
    max_views: int,
    device: torch.device,
    others: Sequence[np.ndarray] = (),
) -> tuple[list[Group], list[Tensor]]:
    """The groups of all views, and `others`, copied to the device at once. params (V, P), source (V,)."""
    planned = [_group(params[rows], rows, source) for rows in _group_rows(params, max_views)]
    tensors = iter(to_device_at_once([*itertools.chain(*(arrays for arrays, _ in planned)), *others], device))
    groups = []
    for _, jitter in planned:
        *arrays, factors = itertools.islice(tensors, _ARRAYS)
        groups.append(Group._make([*arrays, factors.view(-1, 4, 1, 1, 1), jitter]))
    return groups, list(tensors)


def _group(
    params: np.ndarray, rows: np.ndarray, source: np.ndarray
) -> tuple[list[np.ndarray], list[tuple[Op, int, int]]]:
    """The arrays of a `Group` in its order, and the jitter. params (V, P) and rows (V,) of its views."""
    sigma = params[:, Column.BLUR_SIGMA]
    flips = [params[:, Column.FLIP] != 0, params[:, Column.VERTICAL_FLIP] != 0]
    subsets = [*flips, params[:, Column.GREY] != 0, sigma > 0, params[:, Column.SOLARISE] != 0]
    jitter = []
    for op in _op_order(params) if _is_jittered(params).any() else ():
        changes = np.flatnonzero(np.diff(op)) + 1
        edges = [0, *changes.tolist(), len(op)]
        jitter += [(Op(op[start]), start, stop) for start, stop in itertools.pairwise(edges)]
    factors = params[:, Column.BRIGHTNESS : Column.HUE + 1]
    arrays = [rows, source[rows], *map(np.flatnonzero, subsets), sigma[sigma > 0], factors]
    return arrays, jitter


def colour(images: Tensor, group: Group, augmentation: Augmentation) -> None:
    """All but flips and normalisation, in place. images (V, C, S, S)."""
    in_colour = images.shape[1] == 3
    if augmentation.grey_first and in_colour:
        _on_rows(images, group.grey, _to_grey)
    for op, start, stop in group.jitter:
        if in_colour or op in (Op.BRIGHTNESS, Op.CONTRAST):
            _JITTER[op](images[start:stop], group.factors[start:stop, op])
    if not augmentation.grey_first and in_colour:
        _on_rows(images, group.grey, _to_grey)
    taps = blur_taps(augmentation, images.shape[-1])
    if images.is_cuda:
        _on_rows(images, group.blurred, lambda x: blur_grouped_conv(x, group.sigma, taps))
    else:
        blur_sums(images, group.blurred, group.sigma, taps)
    _on_rows(images, group.solarised, lambda x: torch.where(x >= 0.5, 1 - x, x))


def _group_rows(params: np.ndarray, max_views: int) -> Iterator[np.ndarray]:
    """The row numbers of each `Group`."""
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
    levels = luma(images).mul_(_LUMA_LEVELS).to(torch.int32)  # integers: their sum does not depend on its order
    mean = levels.sum((-2, -1), dtype=torch.int64, keepdim=True).double().div_(_LUMA_LEVELS * levels[0].numel())
    return images.mul_(factor).add_(mean.float().mul_(1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """clip(factor · x + (1 − factor) · luma, 0, 1), in place."""
    grey = luma(images).mul_(1 - factor)
    return images.mul_(factor).add_(grey).clamp_(0, 1)


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
    opposite = 6 * shift.view(-1, 1, 1, 1) - torch.arange(3.0, 8.0, 2.0, device=images.device).view(3, 1, 1)
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
    """(V, C, H, W) to (V, 1, H, W): the weighted sum of red, green and blue, or the mean of other channels."""
    if images.shape[1] != 3:
        total = images[:, :1].clone()
        for channel in images.split(1, dim=1)[1:]:
            total.add_(channel)
        return total.mul_(1 / images.shape[1])
    red, green, blue = images.split(1, dim=1)
    total, term = LUMA[0] * red, LUMA[1] * green
    total.add_(term)
    return total.add_(torch.mul(blue, LUMA[2], out=term))


def _to_grey(images: Tensor) -> Tensor:
    return luma(images).expand_as(images)


def blur_grouped_conv(images: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Separable Gaussian blur, one sigma per view, reflected at the border, as two grouped convolutions.

    images (V, C, S, S), sigma (V,) pixels, taps an odd kernel width of at most 2·S − 1.
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


def blur_sums(images: Tensor, rows: Tensor, sigma: Tensor, taps: int) -> None:
    """The same blur of the views in `rows` (n,), in place, as sums of shifted views. sigma (n,) pixels.

    In contrast to a convolution, its results are the same on every processor: each product and each sum is rounded.
    """
    if len(rows) == 0:
        return
    side, weights = images.shape[-1], torch.from_numpy(half_kernels(sigma.numpy(), taps // 2))[..., None, None, None]
    count = max(1, _BLURRED_BYTES // (images.shape[1] * side * side * 4))
    for chosen, weight in zip(rows.split(count), weights.split(count), strict=True):
        blurred = images.index_select(0, chosen)
        radius = int(weight.count_nonzero(1).max()) - 1  # weights decrease with the distance
        for axis, padding in ((3, [radius, radius, 0, 0]), (2, [0, 0, radius, radius])):
            padded = F.pad(blurred, padding, mode="reflect")
            shifted, term = [padded.narrow(axis, k, side) for k in range(2 * radius + 1)], torch.empty_like(blurred)
            torch.mul(shifted[radius], weight[:, 0], out=blurred)
            for k in range(1, radius + 1):
                torch.add(shifted[radius - k], shifted[radius + k], out=term)
                blurred.add_(term.mul_(weight[:, k]))
        _assign_rows(images, chosen, blurred)


def half_kernels(sigma: np.ndarray, radius: int) -> np.ndarray:
    """(n,) float32, in pixels → (n, radius + 1) float32: weights of a Gaussian at distances from 0; 0 below epsilon."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma[:, None]) ** 2)
    weights[weights < np.finfo(np.float32).eps] = 0  # avoids denormal numbers, which make a CPU ten times as slow
    return (weights / weights.sum(1, keepdims=True))[:, radius:].astype(np.float32)


def _on_rows(images: Tensor, rows: Tensor, operation: Callable[[Tensor], Tensor]) -> None:
    """Applies the operation to the views in `rows` (n,). How many they are is known on the host: nothing waits."""
    if len(rows):
        _assign_rows(images, rows, operation(images.index_select(0, rows)))


def _assign_rows(images: Tensor, rows: Tensor, values: Tensor) -> None:
    """images[rows] = values. On a CPU one call copies whole views: half the time of indexing, which copies pixels."""
    if images.is_cuda:
        images.index_copy_(0, rows, values)  # one launch for all views
    else:
        torch._foreach_copy_([images[row] for row in rows.tolist()], list(values.unbind()))
