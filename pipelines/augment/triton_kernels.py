"""The colour kernel of `pipelines.augment.triton_ops`, and the last operations, which it shares with blur.

V views · S side of a crop in pixels

A program processes one view, because contrast needs the mean of the whole image. Pixels are float32 triples (r, g, b)
of tiles (Y, X) in registers; their places y (Y, 1) and x (1, X) belong to rows and columns, so that addresses cost
little.
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

COLUMNS = tl.constexpr(len(Column))
BLUR_SIGMA = tl.constexpr(int(Column.BLUR_SIGMA))
_FLIP = tl.constexpr(int(Column.FLIP))
_ORDER = tl.constexpr(int(Column.ORDER))
_FACTOR = tl.constexpr(int(Column.BRIGHTNESS))  # the first of four, in the order of Op
_GREY = tl.constexpr(int(Column.GREY))
_SOLARISE = tl.constexpr(int(Column.SOLARISE))
_VERTICAL_FLIP = tl.constexpr(int(Column.VERTICAL_FLIP))
_BRIGHTNESS, _CONTRAST = tl.constexpr(int(Op.BRIGHTNESS)), tl.constexpr(int(Op.CONTRAST))
_HUE = tl.constexpr(int(Op.HUE))
_LUMA_R, _LUMA_G, _LUMA_B = tl.constexpr(LUMA[0]), tl.constexpr(LUMA[1]), tl.constexpr(LUMA[2])


@triton.jit
def _luma(r, g, b):
    return _LUMA_R * r + _LUMA_G * g + _LUMA_B * b


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _opposite(shift, own):
    """The hue opposite a channel's own, less the shift, within half a circle (of length 6)."""
    hue = 6.0 * shift - own
    return hue - 6.0 * tl.floor(hue * (1 / 6) + 0.5)


@triton.jit
def _wave(smallest, chroma, difference):
    return smallest + chroma * _clip(2.0 - tl.abs(tl.abs(difference) - 3.0))


@triton.jit
def _rotate_hue(r, g, b, shift):
    """The hue rotation of `torch_ops.adjust_hue`, by its formula."""
    smallest = tl.minimum(tl.minimum(r, g), b)
    chroma = tl.maximum(tl.maximum(r, g), b) - smallest
    root = tl.rsqrt(tl.maximum(chroma, 1e-12))
    hue = (g + b - r - smallest) * root * root + 1.0
    hue = tl.where(g >= b, hue, -hue)
    return (
        _wave(smallest, chroma, hue + _opposite(shift, 3.0)),
        _wave(smallest, chroma, hue + _opposite(shift, 5.0)),
        _wave(smallest, chroma, hue + _opposite(shift, 7.0)),
    )


@triton.jit
def _jitter(r, g, b, row_ptr, mean, first, last):
    """Operations first to last − 1 of the view's order. All pixels take the same branches."""
    order = tl.load(row_ptr + _ORDER).to(tl.int32)
    for position in range(first, last):
        op = (order >> (2 * position)) & 3
        factor = tl.load(row_ptr + _FACTOR + op)
        if op == _HUE:
            if factor != 0.0:
                r, g, b = _rotate_hue(r, g, b, factor)
        else:
            other = 0.0 * r
            if op != _BRIGHTNESS:
                if op == _CONTRAST:
                    other += (1.0 - factor) * mean
                else:
                    other = (1.0 - factor) * _luma(r, g, b)
            r, g, b = _clip(factor * r + other), _clip(factor * g + other), _clip(factor * b + other)
    return r, g, b


@triton.jit
def _before_contrast(row_ptr):
    """How many operations come before contrast."""
    order, count = tl.load(row_ptr + _ORDER).to(tl.int32), 0
    for position in tl.static_range(1, 4):
        count += tl.where(((order >> (2 * position)) & 3) == _CONTRAST, position, 0)
    return count


@triton.jit
def _to_grey_if(r, g, b, grey):
    if grey:
        r = _luma(r, g, b)
        g = r
        b = r
    return r, g, b


@triton.jit
def finish(r, g, b, y, x, inside, view, row_ptr, out_ptr, scale, offset, SIDE: tl.constexpr):
    """Solarise, flip both ways, normalise and store, channels-last."""
    if tl.load(row_ptr + _SOLARISE) != 0.0:
        r, g, b = tl.minimum(r, 1.0 - r), tl.minimum(g, 1.0 - g), tl.minimum(b, 1.0 - b)
    row = tl.where(tl.load(row_ptr + _VERTICAL_FLIP) != 0.0, SIDE - 1 - y, y)
    column = tl.where(tl.load(row_ptr + _FLIP) != 0.0, SIDE - 1 - x, x)
    pixel_ptr = out_ptr + view.to(tl.int64) * (3 * SIDE * SIDE) + (row * (3 * SIDE) + column * 3)
    dtype = out_ptr.dtype.element_ty
    tl.store(pixel_ptr, (r * scale[0] + offset[0]).to(dtype), mask=inside)
    tl.store(pixel_ptr + 1, (g * scale[1] + offset[1]).to(dtype), mask=inside)
    tl.store(pixel_ptr + 2, (b * scale[2] + offset[2]).to(dtype), mask=inside)


@triton.jit
def _read(
    source_ptr, strides, resident, view, y, x, grey,
    SIDE: tl.constexpr, CROP: tl.constexpr, WIDTH: tl.constexpr, GREY_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of a view's crop, in [0, 1]; places past its end repeat the last pixels."""
    pixels_ptr, offsets_ptr, sizes_ptr, boxes_ptr = resident
    image = tl.load(source_ptr + view)
    if CROP:
        base = pixels_ptr + tl.load(offsets_ptr + image)
        width = tl.load(sizes_ptr + 2 * image + 1)
        r, g, b = resample_tile(base, width, boxes_ptr + 4 * view, y, x, SIDE, WIDTH)
        r, g, b = tl.floor(r), tl.floor(g), tl.floor(b)
    else:
        stride_n, stride_y, stride_x, stride_c = strides
        y, x = tl.minimum(y, SIDE - 1), tl.minimum(x, SIDE - 1)
        pixel_ptr = pixels_ptr + image * stride_n + (y * stride_y + x * stride_x)
        r = tl.load(pixel_ptr).to(tl.float32)
        g = tl.load(pixel_ptr + stride_c).to(tl.float32)
        b = tl.load(pixel_ptr + 2 * stride_c).to(tl.float32)
    r, g, b = r * (1 / 255), g * (1 / 255), b * (1 / 255)
    if GREY_FIRST:
        r, g, b = _to_grey_if(r, g, b, grey)
    return r, g, b


@triton.jit
def _store(
    r, g, b, y, x, inside, view, row_ptr, grey, out_ptr, planes_ptr, scale, offset,
    SIDE: tl.constexpr, GREY_FIRST: tl.constexpr, BLUR: tl.constexpr,
):  # fmt: skip
    """Greyscale; then the final operations, or, for a blurred view, a store to the planes for blur."""
    if not GREY_FIRST:
        r, g, b = _to_grey_if(r, g, b, grey)
    if BLUR:
        if tl.load(row_ptr + BLUR_SIGMA) > 0.0:
            pixel_ptr = planes_ptr + view.to(tl.int64) * (3 * SIDE * SIDE) + (y * SIDE + x)
            dtype = planes_ptr.dtype.element_ty
            tl.store(pixel_ptr, r.to(dtype), mask=inside)
            tl.store(pixel_ptr + SIDE * SIDE, g.to(dtype), mask=inside)
            tl.store(pixel_ptr + 2 * SIDE * SIDE, b.to(dtype), mask=inside)
        else:
            finish(r, g, b, y, x, inside, view, row_ptr, out_ptr, scale, offset, SIDE)
    else:
        finish(r, g, b, y, x, inside, view, row_ptr, out_ptr, scale, offset, SIDE)


@triton.jit
def colour_kernel(
    source_ptr, strides, resident, params_ptr, out_ptr, planes_ptr, scale, offset,
    SIDE: tl.constexpr, CROP: tl.constexpr, WIDTH: tl.constexpr, GREY_FIRST: tl.constexpr, BLUR: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """All operations up to blur of one view, and also those after it if the view is not blurred.

    resident is (pixels, offsets, sizes, boxes). With CROP, pixels are whole images, of this WIDTH if planar; otherwise
    crops of these strides. A crop of at most one tile stays in registers. A larger one with contrast is read twice, the
    second time from a cache, because contrast needs the mean luma first.
    """
    view = tl.program_id(0)
    row_ptr = params_ptr + view * COLUMNS
    grey = tl.load(row_ptr + _GREY) != 0.0
    contrast = tl.load(row_ptr + _FACTOR + _CONTRAST) != 1.0
    before = _before_contrast(row_ptr)
    y, x = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    mean = 0.0
    if TILE >= SIDE:
        inside = (y < SIDE) & (x < SIDE)
        r, g, b = _read(source_ptr, strides, resident, view, y, x, grey, SIDE, CROP, WIDTH, GREY_FIRST)
        r, g, b = _jitter(r, g, b, row_ptr, 0.0, 0, before)
        if contrast:
            mean = tl.sum(tl.where(inside, _luma(r, g, b), 0.0)) * (1 / (SIDE * SIDE))
        r, g, b = _jitter(r, g, b, row_ptr, mean, before, 4)
        _store(
            r, g, b, y, x, inside, view, row_ptr, grey, out_ptr, planes_ptr, scale, offset, SIDE, GREY_FIRST, BLUR
        )  # fmt: skip
    else:
        tiles: tl.constexpr = (SIDE + TILE - 1) // TILE
        if contrast:
            total = tl.zeros((TILE, TILE), tl.float32)
            for tile in range(tiles * tiles):
                top, left = tile // tiles * TILE, tile % tiles * TILE
                inside = (top + y < SIDE) & (left + x < SIDE)
                r, g, b = _read(
                    source_ptr, strides, resident, view, top + y, left + x, grey,
                    SIDE, CROP, WIDTH, GREY_FIRST,
                )  # fmt: skip
                r, g, b = _jitter(r, g, b, row_ptr, 0.0, 0, before)
                total += tl.where(inside, _luma(r, g, b), 0.0)
            mean = tl.sum(total) * (1 / (SIDE * SIDE))
        for tile in range(tiles * tiles):
            top, left = tile // tiles * TILE, tile % tiles * TILE
            inside = (top + y < SIDE) & (left + x < SIDE)
            r, g, b = _read(source_ptr, strides, resident, view, top + y, left + x, grey, SIDE, CROP, WIDTH, GREY_FIRST)
            r, g, b = _jitter(r, g, b, row_ptr, mean, 0, 4)
            _store(
                r, g, b, top + y, left + x, inside, view, row_ptr, grey, out_ptr, planes_ptr, scale, offset,
                SIDE, GREY_FIRST, BLUR,
            )  # fmt: skip
