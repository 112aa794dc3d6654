"""Both views of a batch in one launch: the same numbers as `pipelines.augment_torch`, from parameters on the device.

N images · V views · S side of a crop · H, W sides of an image, in pixels

A view is read once and written once, whatever its order of operations. Views with blur take two more kernels, because a
separable blur has to see its neighbours' colours. Nothing is read by the host, so all of it fits a CUDA graph.

What one H200 should need, by 4.3 TB/s and 29 Tinstructions/s (132 multiprocessors of 128 lanes at 1.7 GHz), for both
views of B images written in 16 bits:

    B = 512, S = 32    3 MB read, 6 MB written: 2 µs; about 300 instructions a pixel: 11 µs, the longer of the two
    B = 256, S = 224   77 MB read (twice where there is contrast), 154 MB written: 0.07 ms; instructions: 0.27 ms
    blur of half       308 MB through two float32 planes and back, 0.15 ms; 30 loads a pixel and channel: 0.2 ms
    crops              see `pipelines.resample_triton`
"""

# Compile-time constants are passed as plain values; launch options such as enable_fp_fusion are no kernel parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from pipelines.augment import Augmentation, Column, blur_taps
from pipelines.augment_kernels import blur_columns_kernel, blur_rows_kernel, colour_kernel
from pipelines.resample_triton import ResidentPixels, check, crop

_SMALL = 4096  # pixels of a crop that one program holds in registers: S ≤ 64
_TILE = 1024  # pixels of a tile of larger crops


def apply(
    crops: Tensor,
    params: Tensor,
    augmentation: Augmentation,
    dtype: torch.dtype,
    source: Tensor | None = None,
) -> Tensor:
    """`augment_torch.apply` with parameters and source rows on the device.

    crops   (N, S, S, 3) uint8, any strides
    params  (V, P) float32, columns as in `Column`; a sigma counts only where the recipe has blur at all
    source  (V,) int64, which crop each view comes from; by default the one in its place
    Returns (V, 3, S, S) of `dtype`, channels-last in memory.
    """
    count, side = len(crops), crops.shape[1]
    assert crops.shape == (count, side, side, 3), crops.shape
    assert crops.dtype == torch.uint8, crops.dtype
    return _colour(crops, (params, params, params), False, params, augmentation, side, dtype, source)


def crop_and_apply(
    resident: ResidentPixels,
    boxes: Tensor,
    params: Tensor,
    augmentation: Augmentation,
    side: int,
    dtype: torch.dtype,
    source: Tensor,
) -> Tensor:
    """`crop`, then `apply`: one kernel where S ≤ 64, so that a crop never leaves the registers, else one after another.

    It equals the two steps bit for bit but for the order of sums, since crops are rounded to uint8 levels in between.
    Arguments and result as theirs; row v of boxes, params and source is view v.
    """
    if side * side > _SMALL:
        return apply(crop(resident, boxes, side, source), params, augmentation, dtype)
    boxes = boxes.contiguous()
    check(resident, boxes, source)
    place = resident.offsets, resident.sizes, boxes
    return _colour(resident.pixels, place, resident.planar, params, augmentation, side, dtype, source, cropping=True)


def _colour(
    pixels: Tensor,
    place: tuple[Tensor, Tensor, Tensor],
    planar: bool,
    params: Tensor,
    augmentation: Augmentation,
    side: int,
    dtype: torch.dtype,
    source: Tensor | None,
    cropping: bool = False,
) -> Tensor:
    """pixels are crops, or whole images where `place` (offsets, sizes, boxes) says what to cut out of them."""
    views = len(params)
    params = params.contiguous()
    assert params.shape == (views, len(Column)), params.shape
    assert params.dtype == torch.float32, params.dtype
    source = torch.arange(views, device=pixels.device) if source is None else source.contiguous()
    assert source.shape == (views,), (source.shape, views)
    assert source.dtype == torch.int64, source.dtype
    out = torch.empty((views, side, side, 3), dtype=dtype, device=pixels.device)
    blur = augmentation.blur_p > 0
    colours, rows = (
        torch.empty((2 if blur else 0, views, 3, side, side), dtype=torch.float32, device=pixels.device)
        if blur
        else (out, out)
    )
    small = side * side <= _SMALL
    normalisation = augmentation.mean, augmentation.std
    options: dict[str, Any] = {"SIDE": side, "num_warps": 8, "enable_fp_fusion": True}
    colour_kernel[(views,)](
        source,
        (0, 0, 0, 0) if cropping else pixels.stride(),
        (pixels, *place),
        params,
        out,
        colours,
        *normalisation,
        CROP=cropping,
        PLANAR=planar,
        GREY_FIRST=augmentation.grey_first,
        BLUR=blur,
        BLOCK=triton.next_power_of_2(side * side) if small else _TILE,
        **{**options, "num_warps": 4 if side * side <= _TILE else 8},
    )
    if blur:
        options |= {"RADIUS": blur_taps(augmentation, side) // 2, "BLOCK": _TILE}
        grid = triton.cdiv(3 * side * side, _TILE), views
        blur_rows_kernel[grid](colours, rows, params, **options)
        grid = triton.cdiv(side * side, _TILE), views
        blur_columns_kernel[grid](rows, out, params, *normalisation, **options)
    return out.permute(0, 3, 1, 2)
