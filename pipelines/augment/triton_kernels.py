"""The kernels of `pipelines.augment.triton_ops`.

V views · S side of a crop in pixels

A program of the colour kernel processes one view, because contrast needs the mean of the whole image; programs of the
other kernels process a tile of a view. Pixels are float32 triples (r, g, b) in registers.
"""

# Compile-time constants are in capitals, as usual in Triton; type checkers do not understand its types.
# ruff: noqa: N803
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from pipelines.augment.params import Column, Op
from pipelines.augment.resample_triton import resample_tile
from pipelines.augment.torch_ops import LUMA

_COLUMNS = tl.constexpr(len(Column))
_FLIP = tl.constexpr(int(Column.FLIP))
_ORDER = tl.constexpr(int(Column.ORDER))
_FACTOR = tl.constexpr(int(Column.BRIGHTNESS))  # the first of four, in the order of Op
_GREY = tl.constexpr(int(Column.GREY))
_BLUR_SIGMA = tl.constexpr(int(Column.BLUR_SIGMA))
_SOLARISE = tl.constexpr(int(Column.SOLARISE))
_BRIGHTNESS, _CONTRAST = tl.constexpr(int(Op.BRIGHTNESS)), tl.constexpr(int(Op.CONTRAST))
_HUE = tl.constexpr(int(Op.HUE))
_LUMA_R, _LUMA_G, _LUMA_B = tl.constexpr(LUMA[0]), tl.constexpr(LUMA[1]), tl.constexpr(LUMA[2])


@triton.jit
def _luma(r, g, b):
    return _LUMA_R * r + _LUMA_G * g + _LUMA_B * b


@triton.jit
def _mix(x, other, factor):
    """clip(factor · x + (1 − factor) · other, 0, 1), exact for a factor of 1."""
    return tl.minimum(tl.maximum(x - (x - other) * (1.0 - factor), 0.0), 1.0)


@triton.jit
def _wave(chroma, smallest, ramp):
    return smallest + chroma * tl.minimum(tl.maximum(ramp, 0.0), 1.0)


@triton.jit
def _rotate_hue(r, g, b, shift):
    """The hue rotation of `torch_ops.adjust_hue`, by sectors of HSV."""
    largest = tl.maximum(tl.maximum(r, g), b)
    smallest = tl.minimum(tl.minimum(r, g), b)
    chroma = largest - smallest
    scale = 1.0 / tl.maximum(chroma, 1e-12)
    hue = tl.where(largest == r, (g - b) * scale, tl.where(largest == g, (b - r) * scale + 2.0, (r - g) * scale + 4.0))
    hue += 6.0 * shift
    hue -= 6.0 * tl.floor(hue / 6.0)
    return (
        _wave(chroma, smallest, tl.abs(hue - 3.0) - 1.0),
        _wave(chroma, smallest, 2.0 - tl.abs(hue - 2.0)),
        _wave(chroma, smallest, 2.0 - tl.abs(hue - 4.0)),
    )


@triton.jit
def _jitter(r, g, b, row_ptr, mean, BEFORE_CONTRAST: tl.constexpr):
    """The four operations in the view's order, or only those before contrast. All pixels take the same branches."""
    order = tl.load(row_ptr + _ORDER).to(tl.int32)
    active = True
    for position in tl.static_range(4):
        op = (order >> (2 * position)) & 3
        factor = tl.load(row_ptr + _FACTOR + op)
        if BEFORE_CONTRAST:
            active = active & (op != _CONTRAST)
        if active:
            if op == _BRIGHTNESS:
                r = tl.minimum(tl.maximum(r * factor, 0.0), 1.0)
                g = tl.minimum(tl.maximum(g * factor, 0.0), 1.0)
                b = tl.minimum(tl.maximum(b * factor, 0.0), 1.0)
            elif op == _HUE:
                if factor != 0.0:
                    r, g, b = _rotate_hue(r, g, b, factor)
            else:
                other = _luma(r, g, b)
                if op == _CONTRAST:
                    other = other * 0.0 + mean
                r, g, b = _mix(r, other, factor), _mix(g, other, factor), _mix(b, other, factor)
    return r, g, b


@triton.jit
def _to_grey_if(r, g, b, grey):
    if grey:
        r = _luma(r, g, b)
        g = r
        b = r
    return r, g, b


@triton.jit
def _finish(r, g, b, pixel, inside, view, row_ptr, out_ptr, mean, std, SIDE: tl.constexpr):
    """Solarise, flip, normalise and store, channels-last."""
    if tl.load(row_ptr + _SOLARISE) != 0.0:
        r, g, b = tl.where(r >= 0.5, 1.0 - r, r), tl.where(g >= 0.5, 1.0 - g, g), tl.where(b >= 0.5, 1.0 - b, b)
    y, x = pixel // SIDE, pixel % SIDE
    if tl.load(row_ptr + _FLIP) != 0.0:
        x = SIDE - 1 - x
    pixel_ptr = out_ptr + view.to(tl.int64) * (3 * SIDE * SIDE) + (y * SIDE + x) * 3
    dtype = out_ptr.dtype.element_ty
    tl.store(pixel_ptr, ((r - mean[0]) / std[0]).to(dtype), mask=inside)
    tl.store(pixel_ptr + 1, ((g - mean[1]) / std[1]).to(dtype), mask=inside)
    tl.store(pixel_ptr + 2, ((b - mean[2]) / std[2]).to(dtype), mask=inside)


@triton.jit
def _read(
    source_ptr, strides, resident, view, pixel, inside, grey,
    SIDE: tl.constexpr, CROP: tl.constexpr, PLANAR: tl.constexpr, GREY_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of a view's crop, in [0, 1]."""
    pixels_ptr, offsets_ptr, sizes_ptr, boxes_ptr = resident
    image = tl.load(source_ptr + view)
    if CROP:
        base = pixels_ptr + tl.load(offsets_ptr + image)
        width = tl.load(sizes_ptr + 2 * image + 1)
        r, g, b = resample_tile(base, width, boxes_ptr + 4 * view, pixel, inside, SIDE, PLANAR)
    else:
        stride_n, stride_y, stride_x, stride_c = strides
        pixel_ptr = pixels_ptr + image * stride_n + (pixel // SIDE) * stride_y + (pixel % SIDE) * stride_x
        r = tl.load(pixel_ptr, mask=inside, other=0).to(tl.float32)
        g = tl.load(pixel_ptr + stride_c, mask=inside, other=0).to(tl.float32)
        b = tl.load(pixel_ptr + 2 * stride_c, mask=inside, other=0).to(tl.float32)
    r, g, b = r / 255.0, g / 255.0, b / 255.0
    if GREY_FIRST:
        r, g, b = _to_grey_if(r, g, b, grey)
    return r, g, b


@triton.jit
def _luma_sum(r, g, b, inside, row_ptr):
    """Sum over one tile of the luma that contrast sees: after the operations before it."""
    r, g, b = _jitter(r, g, b, row_ptr, 0.0, True)
    return tl.sum(tl.where(inside, _luma(r, g, b), 0.0), axis=0)


@triton.jit
def _jitter_and_store(
    r, g, b, pixel, inside, view, row_ptr, luma, grey, out_ptr, blurred_ptr, mean, std,
    SIDE: tl.constexpr, GREY_FIRST: tl.constexpr, BLUR: tl.constexpr,
):  # fmt: skip
    """Jitter and greyscale; then the final operations, or, for a blurred view, a store to the planes for blur."""
    r, g, b = _jitter(r, g, b, row_ptr, luma, False)
    if not GREY_FIRST:
        r, g, b = _to_grey_if(r, g, b, grey)
    if BLUR:
        if tl.load(row_ptr + _BLUR_SIGMA) > 0.0:
            pixel_ptr = blurred_ptr + view.to(tl.int64) * (3 * SIDE * SIDE) + pixel
            tl.store(pixel_ptr, r, mask=inside)
            tl.store(pixel_ptr + SIDE * SIDE, g, mask=inside)
            tl.store(pixel_ptr + 2 * SIDE * SIDE, b, mask=inside)
        else:
            _finish(r, g, b, pixel, inside, view, row_ptr, out_ptr, mean, std, SIDE)
    else:
        _finish(r, g, b, pixel, inside, view, row_ptr, out_ptr, mean, std, SIDE)


@triton.jit
def colour_kernel(
    source_ptr, strides, resident, params_ptr, out_ptr, blurred_ptr, mean, std,
    SIDE: tl.constexpr, CROP: tl.constexpr, PLANAR: tl.constexpr, GREY_FIRST: tl.constexpr, BLUR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All operations up to blur of one view, and also those after it if the view is not blurred.

    resident is (pixels, offsets, sizes, boxes). With CROP, pixels are whole images; otherwise crops of these strides.
    A crop of at most BLOCK pixels stays in registers. A larger one with contrast is read twice, the second time from a
    cache, because contrast needs the mean luma first.
    """
    view = tl.program_id(0)
    row_ptr = params_ptr + view * _COLUMNS
    grey = tl.load(row_ptr + _GREY) != 0.0
    contrast = tl.load(row_ptr + _FACTOR + _CONTRAST)
    total = 0.0
    pixel = tl.arange(0, BLOCK)
    if BLOCK >= SIDE * SIDE:
        inside = pixel < SIDE * SIDE
        r, g, b = _read(source_ptr, strides, resident, view, pixel, inside, grey, SIDE, CROP, PLANAR, GREY_FIRST)
        if contrast != 1.0:
            total = _luma_sum(r, g, b, inside, row_ptr)
        _jitter_and_store(
            r, g, b, pixel, inside, view, row_ptr, total / (SIDE * SIDE), grey, out_ptr, blurred_ptr, mean, std,
            SIDE, GREY_FIRST, BLUR,
        )  # fmt: skip
    else:
        if contrast != 1.0:
            for start in range(0, SIDE * SIDE, BLOCK):
                inside = start + pixel < SIDE * SIDE
                r, g, b = _read(
                    source_ptr, strides, resident, view, start + pixel, inside, grey, SIDE, CROP, PLANAR, GREY_FIRST
                )
                total += _luma_sum(r, g, b, inside, row_ptr)
        for start in range(0, SIDE * SIDE, BLOCK):
            inside = start + pixel < SIDE * SIDE
            r, g, b = _read(
                source_ptr, strides, resident, view, start + pixel, inside, grey, SIDE, CROP, PLANAR, GREY_FIRST
            )
            _jitter_and_store(
                r, g, b, start + pixel, inside, view, row_ptr, total / (SIDE * SIDE), grey, out_ptr, blurred_ptr,
                mean, std, SIDE, GREY_FIRST, BLUR,
            )  # fmt: skip


@triton.jit
def _reflect(index, SIDE: tl.constexpr):
    """… 2 1 | 0 1 2 … S−1 | S−2 …, for an index at most S − 1 outside."""
    index = tl.abs(index)
    return SIDE - 1 - tl.abs(SIDE - 1 - index)


@triton.jit
def _gaussian(sigma, distance):
    ratio = distance / sigma
    return tl.exp(-0.5 * ratio * ratio)


@triton.jit
def blur_rows_kernel(in_ptr, out_ptr, params_ptr, SIDE: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """Blur along the rows, float32 (V, 3, S, S) → the same; views without blur are skipped."""
    view = tl.program_id(1)
    sigma = tl.load(params_ptr + view * _COLUMNS + _BLUR_SIGMA)
    if sigma > 0.0:
        offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < 3 * SIDE * SIDE
        base = view.to(tl.int64) * (3 * SIDE * SIDE)
        x = offset % SIDE
        norm = 0.0
        for tap in range(-RADIUS, RADIUS + 1):
            norm += _gaussian(sigma, tap * 1.0)
        total = tl.zeros((BLOCK,), tl.float32)
        for tap in range(-RADIUS, RADIUS + 1):
            neighbour = tl.load(in_ptr + base + offset - x + _reflect(x + tap, SIDE), mask=inside, other=0.0)
            total += _gaussian(sigma, tap * 1.0) / norm * neighbour
        tl.store(out_ptr + base + offset, total, mask=inside)


@triton.jit
def blur_columns_kernel(
    in_ptr, out_ptr, params_ptr, mean, std,
    SIDE: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blur along the columns, then the operations after blur."""
    view = tl.program_id(1)
    row_ptr = params_ptr + view * _COLUMNS
    sigma = tl.load(row_ptr + _BLUR_SIGMA)
    if sigma > 0.0:
        pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < SIDE * SIDE
        base = in_ptr + view.to(tl.int64) * (3 * SIDE * SIDE)
        y, x = pixel // SIDE, pixel % SIDE
        norm = 0.0
        for tap in range(-RADIUS, RADIUS + 1):
            norm += _gaussian(sigma, tap * 1.0)
        r = tl.zeros((BLOCK,), tl.float32)
        g = tl.zeros((BLOCK,), tl.float32)
        b = tl.zeros((BLOCK,), tl.float32)
        for tap in range(-RADIUS, RADIUS + 1):
            weight = _gaussian(sigma, tap * 1.0) / norm
            pixel_ptr = base + _reflect(y + tap, SIDE) * SIDE + x
            r += weight * tl.load(pixel_ptr, mask=inside, other=0.0)
            g += weight * tl.load(pixel_ptr + SIDE * SIDE, mask=inside, other=0.0)
            b += weight * tl.load(pixel_ptr + 2 * SIDE * SIDE, mask=inside, other=0.0)
        _finish(r, g, b, pixel, inside, view, row_ptr, out_ptr, mean, std, SIDE)
