"""Crops of decoded images of any size in device memory, in one launch, with the filter of `augment.resample`.

N images · V views · S side of a crop · H, W sides of an image, in pixels

Bound by loads: each output pixel reads 4 source pixels if the crop is enlarged, and (2s)² if a box of s·S pixels is
reduced, three bytes each, mostly from the first-level cache. Both views of 256 images at S = 224 and s = 1.5 are 0.7 G
loads, about 0.1 ms on an H200 (132 multiprocessors, 32 loads per clock at 1.7 GHz); both of 512 at S = 32 are 13 M and
take no longer than a launch.
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

_TILE = 1024  # pixels


@triton.jit
def _weight(pixel, first, length, centre, reach):
    """The unnormalised weight of `resample.filter_matrix`; first and length bound the box."""
    weight = tl.maximum(1.0 - tl.abs((pixel.to(tl.float32) + 0.5) / reach - centre), 0.0)
    return tl.where((pixel >= first) & (pixel < first + length), weight, 0.0)


@triton.jit
def resample_tile(pixels_ptr, width, box_ptr, pixel, inside, SIDE: tl.constexpr, PLANAR: tl.constexpr):
    """Crop and antialiased bilinear resize of one tile, rounded to levels 0 to 255: along x first, then along y.

    At most ⌈2·max(s, 1)⌉ taps per axis for a box of s·S pixels: 4 source pixels for an enlarged crop, (2s)² for a
    reduced one. Neighbouring pixels share them, so the first-level cache serves most loads.
    """
    pixel = tl.minimum(pixel, SIDE * SIDE - 1)  # lanes past the last pixel repeat it: no weights of 0 / 0
    top, left = tl.load(box_ptr), tl.load(box_ptr + 1)
    box_h, box_w = tl.load(box_ptr + 2), tl.load(box_ptr + 3)
    scale_y, scale_x = tl.div_rn(box_h.to(tl.float32), SIDE * 1.0), tl.div_rn(box_w.to(tl.float32), SIDE * 1.0)
    reach_y, reach_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    taps_y, taps_x = tl.ceil(2.0 * reach_y).to(tl.int32), tl.ceil(2.0 * reach_x).to(tl.int32)
    middle_y = top.to(tl.float32) + ((pixel // SIDE).to(tl.float32) + 0.5) * scale_y
    middle_x = left.to(tl.float32) + ((pixel % SIDE).to(tl.float32) + 0.5) * scale_x
    first_y = tl.floor(middle_y - reach_y + 0.5).to(tl.int32)
    first_x = tl.floor(middle_x - reach_x + 0.5).to(tl.int32)
    centre_y, centre_x = middle_y / reach_y, middle_x / reach_x

    zero = middle_y * 0.0
    sum_y, sum_x = zero, zero
    for tap in range(0, taps_y):
        sum_y += _weight(first_y + tap, top, box_h, centre_y, reach_y)
    for tap in range(0, taps_x):
        sum_x += _weight(first_x + tap, left, box_w, centre_x, reach_x)

    r, g, b = zero, zero, zero
    channel = width if PLANAR else 1
    for tap_y in range(0, taps_y):
        y = first_y + tap_y
        weight_y = _weight(y, top, box_h, centre_y, reach_y) / sum_y
        row_r, row_g, row_b = zero, zero, zero
        for tap_x in range(0, taps_x):
            x = first_x + tap_x
            weight_x = _weight(x, left, box_w, centre_x, reach_x) / sum_x
            used = inside & (weight_y > 0.0) & (weight_x > 0.0)
            pixel_ptr = pixels_ptr + y.to(tl.int64) * (3 * width) + (x if PLANAR else 3 * x)
            row_r += weight_x * tl.load(pixel_ptr, mask=used, other=0).to(tl.float32)
            row_g += weight_x * tl.load(pixel_ptr + channel, mask=used, other=0).to(tl.float32)
            row_b += weight_x * tl.load(pixel_ptr + 2 * channel, mask=used, other=0).to(tl.float32)
        r += weight_y * row_r
        g += weight_y * row_g
        b += weight_y * row_b
    return (
        tl.minimum(tl.floor(r + 0.5), 255.0),
        tl.minimum(tl.floor(g + 0.5), 255.0),
        tl.minimum(tl.floor(b + 0.5), 255.0),
    )


@triton.jit
def _crop_kernel(
    pixels_ptr, offsets_ptr, sizes_ptr, source_ptr, boxes_ptr, out_ptr,
    SIDE: tl.constexpr, PLANAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Crops without colour: (V, S, S, 3) uint8."""
    view = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIDE * SIDE
    image = tl.load(source_ptr + view)
    r, g, b = resample_tile(
        pixels_ptr + tl.load(offsets_ptr + image),
        tl.load(sizes_ptr + 2 * image + 1),
        boxes_ptr + 4 * view,
        pixel,
        inside,
        SIDE,
        PLANAR,
    )
    pixel_ptr = out_ptr + view.to(tl.int64) * (3 * SIDE * SIDE) + 3 * pixel
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
    _crop_kernel[(triton.cdiv(side * side, _TILE), len(boxes))](
        resident.pixels,
        resident.offsets,
        resident.sizes,
        source,
        boxes,
        out,
        SIDE=side,
        PLANAR=resident.planar,
        BLOCK=_TILE,
        num_warps=8,
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
