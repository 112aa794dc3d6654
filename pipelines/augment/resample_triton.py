"""Crops of decoded images of any size in device memory, in one launch, with the filter of `augment.resample`.

N images · V views · S side of a crop · H, W sides of an image, in pixels

Bound by instructions: an output pixel has 2 taps per axis if the crop is enlarged, and ⌈2s⌉ if a box of s·S pixels is
reduced. Counted in the code compiled for sm_90, a tap takes 14 instructions, three of them loads that mostly hit the
first-level cache, a row of taps 13 and a pixel 55. Estimate for both views of 256 images at S = 224 on an H200 (29
Tinstructions/s): 0.2 ms for s = 1.5.
"""

# Compile-time constants are in capitals, as usual in Triton, and are passed as plain values; launch options such as
# enable_fp_fusion are not kernel parameters.
# ruff: noqa: N803
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.data.resident_pixels import ResidentPixels

_TILE = 32  # pixels, either side


@triton.jit
def _first_tap(start, length, position, SIDE: tl.constexpr):
    """Along one axis: (first source pixel, its centre less the filter's, 1 / half-width of the filter, taps)."""
    scale = tl.div_rn(length.to(tl.float32), SIDE * 1.0)
    reach = tl.maximum(scale, 1.0)
    position = tl.minimum(position, SIDE - 1)  # lanes past the last pixel repeat it: no weights of 0 / 0
    middle = start.to(tl.float32) + (position.to(tl.float32) + 0.5) * scale
    first = tl.floor(middle - reach + 0.5)
    return first.to(tl.int32), first + 0.5 - middle, 1.0 / reach, tl.ceil(2.0 * reach).to(tl.int32)


@triton.jit
def _tap(first, distance, steepness, tap, start, length):
    """The source pixel of one tap, moved into the box, and its unnormalised weight, 0 if it was outside."""
    pixel = first + tap
    moved = tl.minimum(tl.maximum(pixel, start), start + length - 1)
    weight = tl.maximum(1.0 - tl.abs(distance + tap * 1.0) * steepness, 0.0)
    return moved, tl.where(moved == pixel, weight, 0.0)


@triton.jit
def resample_tile(pixels_ptr, width, box_ptr, y, x, SIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Crop and antialiased bilinear resize of a tile: three (Y, X) float32 of 0.5 to 255.5, to be truncated to levels.

    y (Y, 1) and x (1, X) are positions in the crop; WIDTH is that of all images if planar, otherwise 0. Weights
    belong to a row or a column of the tile and are added up on the way: one division normalises a pixel. At most
    ⌈2·max(s, 1)⌉ taps per axis for a box of s·S pixels.
    """
    top, left = tl.load(box_ptr), tl.load(box_ptr + 1)
    box_h, box_w = tl.load(box_ptr + 2), tl.load(box_ptr + 3)
    first_y, distance_y, steepness_y, taps_y = _first_tap(top, box_h, y, SIDE)
    first_x, distance_x, steepness_x, taps_x = _first_tap(left, box_w, x, SIDE)
    row_bytes = 3 * (WIDTH if WIDTH else width)
    sum_y, sum_x = tl.zeros_like(distance_y), tl.zeros_like(distance_x)
    r = tl.zeros((y.shape[0], x.shape[1]), tl.float32)
    g, b = r, r
    for tap_y in range(0, taps_y):
        row, weight_y = _tap(first_y, distance_y, steepness_y, tap_y, top, box_h)
        sum_y += weight_y
        row_ptr = pixels_ptr + row * row_bytes
        for tap_x in range(0, taps_x):
            column, weight_x = _tap(first_x, distance_x, steepness_x, tap_x, left, box_w)
            sum_x += weight_x
            weight = weight_y * weight_x
            pixel_ptr = row_ptr + (column if WIDTH else 3 * column)
            r += weight * tl.load(pixel_ptr).to(tl.float32)
            g += weight * tl.load(pixel_ptr + (WIDTH if WIDTH else 1)).to(tl.float32)
            b += weight * tl.load(pixel_ptr + (2 * WIDTH if WIDTH else 2)).to(tl.float32)
    scale = taps_y.to(tl.float32) / (sum_y * sum_x)  # the weights along x were added up once per row of taps
    return r * scale + 0.5, g * scale + 0.5, b * scale + 0.5


@triton.jit
def _crop_kernel(
    pixels_ptr, offsets_ptr, sizes_ptr, source_ptr, boxes_ptr, out_ptr,
    SIDE: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Crops without colour: (V, S, S, 3) uint8."""
    view = tl.program_id(2)
    y = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    x = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    inside = (y < SIDE) & (x < SIDE)
    image = tl.load(source_ptr + view)
    r, g, b = resample_tile(
        pixels_ptr + tl.load(offsets_ptr + image),
        tl.load(sizes_ptr + 2 * image + 1),
        boxes_ptr + 4 * view,
        y,
        x,
        SIDE,
        WIDTH,
    )
    pixel_ptr = out_ptr + view.to(tl.int64) * (3 * SIDE * SIDE) + 3 * (y * SIDE + x)
    tl.store(pixel_ptr, r.to(tl.uint8), mask=inside)
    tl.store(pixel_ptr + 1, g.to(tl.uint8), mask=inside)
    tl.store(pixel_ptr + 2, b.to(tl.uint8), mask=inside)


def crop(resident: ResidentPixels, boxes: Tensor, side: int, source: Tensor) -> Tensor:
    """Antialiased bilinear crops, rounded to nearest, like those of `resample.crop_resize`.

    boxes (V, 4) int32 top, left, height, width in pixels inside their images; source (V,) int64, which image each view
    comes from. Returns (V, S, S, 3) uint8.
    """
    boxes, source = boxes.contiguous(), source.contiguous()
    check(resident, boxes, source)
    out = torch.empty((len(boxes), side, side, 3), dtype=torch.uint8, device=boxes.device)
    tiles = triton.cdiv(side, _TILE)
    _crop_kernel[(tiles, tiles, len(boxes))](
        resident.pixels,
        resident.offsets,
        resident.sizes,
        source,
        boxes,
        out,
        SIDE=side,
        WIDTH=resident.pixels.shape[3] if resident.planar else 0,
        TILE=_TILE,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def check(resident: ResidentPixels, boxes: Tensor, source: Tensor) -> None:
    """Asserts types, layout, and one source row per box."""
    assert resident.pixels.dtype == torch.uint8
    assert resident.pixels.is_contiguous()
    assert resident.offsets.dtype == torch.int64
    assert resident.sizes.dtype == boxes.dtype == torch.int32, (resident.sizes.dtype, boxes.dtype)
    assert resident.sizes.is_contiguous()
    assert boxes.shape == (len(source), 4), (boxes.shape, source.shape)
