"""Colour augmentation of both views of a batch in one launch: the results of `augment.torch_ops`, computed by Triton.

N images · V views · S side of a crop · H, W sides of an image, in pixels

A view is read once and written once, whatever its order of operations. Views with blur take two more kernels, because
separable blur needs the colours of neighbouring pixels. Parameters are on the device and the host reads nothing, so all
of it can be captured in a CUDA graph.

Estimate for one H200 with 4.3 TB/s and 29 Tinstructions/s (132 multiprocessors of 128 lanes at 1.7 GHz), for both views
of B images written in 16 bits; instructions per pixel are counted in the code compiled for sm_90, of a jittered view:

    B = 512, S = 32    3 MB read, 6 MB written: 2 µs; about 210 instructions, 120 of them for the crop: 8 µs
    B = 256, S = 224   77 MB read (twice with contrast), 154 MB written: 0.07 ms; about 160 instructions: 0.14 ms
    blur of half       154 MB through each of two fp16 planes: 0.07 ms; about 270 instructions: 0.12 ms
    crops              see `pipelines.augment.resample_triton`
"""

# Compile-time constants are passed as plain values; launch options such as enable_fp_fusion are not kernel parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
from torch import Tensor

from pipelines.augment.blur_triton import blur_columns_kernel, blur_rows_kernel
from pipelines.augment.params import Column, blur_taps
from pipelines.augment.presets import Augmentation
from pipelines.augment.resample_triton import check, crop
from pipelines.augment.triton_kernels import colour_kernel
from pipelines.data.resident_pixels import ResidentPixels

_SMALL = 64  # side of a crop that one program holds in registers
_CROP_SMALL = 32  # likewise for one that it also crops: above that the compiler spills registers
_TILE = 32  # side of a tile of larger crops, in pixels


def apply(
    crops: Tensor,
    params: Tensor,
    augmentation: Augmentation,
    dtype: torch.dtype,
    source: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`torch_ops.apply` with parameters and source rows on the device.

    crops   (N, S, S, 3) uint8, any strides
    params  (V, P) float32, columns as in `Column`; sigma is ignored if the recipe has no blur
    source  (V,) int64, which crop each view comes from; by default crop v for view v
    out     an earlier result of the same shape and type, which is overwritten
    Returns (V, 3, S, S) of `dtype`, channels-last in memory. Views of 16 bits pass through fp16 planes on their way
    through blur, which moves their values by at most 2^-11 before normalisation, an eighth of a uint8 level.
    """
    count, side = len(crops), crops.shape[1]
    assert crops.shape == (count, side, side, 3), crops.shape
    assert crops.dtype == torch.uint8, crops.dtype
    return _colour(crops, None, params, augmentation, side, dtype, source, out)


def crop_and_apply(
    resident: ResidentPixels,
    boxes: Tensor,
    params: Tensor,
    augmentation: Augmentation,
    side: int,
    dtype: torch.dtype,
    source: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """`crop`, then `apply`: one fused kernel for S ≤ 32, whose crops never leave the registers, otherwise two steps.

    The fused kernel also rounds crops to uint8 levels, so it equals the two steps up to the order of sums. Arguments
    and result are those of `crop` and `apply`; row v of boxes, params and source is view v.
    """
    if side > _CROP_SMALL:
        return apply(crop(resident, boxes, side, source), params, augmentation, dtype, out=out)
    boxes = boxes.contiguous()
    check(resident, boxes, source)
    return _colour(resident, boxes, params, augmentation, side, dtype, source, out)


def _colour(
    images: Tensor | ResidentPixels,
    boxes: Tensor | None,
    params: Tensor,
    augmentation: Augmentation,
    side: int,
    dtype: torch.dtype,
    source: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """The common part of `apply` (images are crops) and `crop_and_apply` (whole images and boxes)."""
    views, device = len(params), params.device
    params = params.contiguous()
    assert params.shape == (views, len(Column)), params.shape
    assert params.dtype == torch.float32, params.dtype
    source = torch.arange(views, device=device) if source is None else source.contiguous()
    assert source.shape == (views,), (source.shape, views)
    assert source.dtype == torch.int64, source.dtype
    crops_too = isinstance(images, ResidentPixels)
    if crops_too:
        resident, strides = (images.pixels, images.offsets, images.sizes, boxes), (0, 0, 0, 0)
    else:
        resident, strides = (images, source, source, source), images.stride()  # three unused pointers

    if out is None:
        out = torch.empty((views, side, side, 3), dtype=dtype, device=device).permute(0, 3, 1, 2)
    assert (out.shape, out.dtype) == ((views, 3, side, side), dtype), (out.shape, out.dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)
    pixels_out = out.permute(0, 2, 3, 1)
    blur = augmentation.blur_p > 0
    # Intermediate planes of blurred views; those of others stay unwritten. If views have 16 bits, planes are fp16: in
    # [0, 1] its rounding error is at most 2^-12, that of bf16 eight times as large.
    plane_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    planes = torch.empty((2, views, 3, side, side), dtype=plane_dtype, device=device) if blur else None
    colours, columns = (pixels_out, pixels_out) if planes is None else planes
    scale = tuple(1 / std for std in augmentation.std)
    offset = tuple(-mean / std for mean, std in zip(augmentation.mean, augmentation.std, strict=True))
    tile = triton.next_power_of_2(side) if side <= _SMALL else _TILE
    colour_kernel[(views,)](
        source,
        strides,
        resident,
        params,
        pixels_out,
        colours,
        scale,
        offset,
        SIDE=side,
        CROP=crops_too,
        WIDTH=images.pixels.shape[3] if crops_too and images.planar else 0,
        GREY_FIRST=augmentation.grey_first,
        BLUR=blur,
        TILE=tile,
        num_warps=8 if side > _SMALL else min(16, max(4, tile * tile // 256)),
        enable_fp_fusion=True,
    )
    if blur:
        tiles = triton.cdiv(side, _TILE)
        options = {"SIDE": side, "RADIUS": blur_taps(augmentation, side) // 2, "TILE": _TILE}
        options |= {"num_warps": 4, "enable_fp_fusion": True}
        blur_columns_kernel[tiles, tiles, views](colours, columns, params, **options)
        blur_rows_kernel[tiles, tiles, views](columns, pixels_out, params, scale, offset, **options)
    return out
