"""The blur kernels of `pipelines.augment.triton_ops`: a separable Gaussian in two passes.

V views · S side of a crop in pixels

Both passes blur along the slow axis of planes (V, 3, S, S), so that a tap reads neighbours along the fast axis as one
vector; the first writes its result transposed. A program processes a tile of all three channels, which share weights
and addresses. Sums are float32, planes float32 or fp16.
"""

# ruff: noqa: N803
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math

import triton
import triton.language as tl

from pipelines.augment.triton_kernels import BLUR_SIGMA, COLUMNS, finish

# Weights below 2^-23 of the largest are left out, as in `torch_ops.half_kernels`: those at more than 5.65 sigma.
_REACH = tl.constexpr(math.sqrt(2 * 23 * math.log(2)))
_EXPONENT = tl.constexpr(-0.5 * math.log2(math.e))


@triton.jit
def _reflect(index, SIDE: tl.constexpr):
    """… 2 1 | 0 1 2 … S−1 | S−2 …, for an index at most S − 1 outside."""
    return SIDE - 1 - tl.abs(SIDE - 1 - tl.abs(index))


@triton.jit
def _blur(planes_ptr, sigma, slow, fast, SIDE: tl.constexpr, RADIUS: tl.constexpr, TILE: tl.constexpr):
    """A tile of three planes (3, S, S), blurred along the slow axis. slow (T, 1) and fast (1, T): three (T, T)."""
    r = tl.zeros((TILE, TILE), tl.float32)
    g, b = r, r
    norm = 0.0
    radius = tl.minimum(tl.ceil(sigma * _REACH).to(tl.int32), RADIUS)
    slow = tl.minimum(slow, SIDE - 1)
    inside = None if SIDE % TILE == 0 else fast < SIDE
    for tap in range(-radius, radius + 1):
        ratio = tap / sigma
        weight = tl.exp2(ratio * ratio * _EXPONENT)
        norm += weight
        pixel_ptr = planes_ptr + (_reflect(slow + tap, SIDE) * SIDE + fast)
        r += weight * tl.load(pixel_ptr, mask=inside).to(tl.float32)
        g += weight * tl.load(pixel_ptr + SIDE * SIDE, mask=inside).to(tl.float32)
        b += weight * tl.load(pixel_ptr + 2 * SIDE * SIDE, mask=inside).to(tl.float32)
    scale = 1.0 / norm
    return r * scale, g * scale, b * scale


@triton.jit
def blur_columns_kernel(
    in_ptr, out_ptr, params_ptr, SIDE: tl.constexpr, RADIUS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Blur along the columns: planes (V, 3, y, x) to (V, 3, x, y). Views without blur are skipped."""
    view = tl.program_id(2)
    sigma = tl.load(params_ptr + view * COLUMNS + BLUR_SIGMA)
    if sigma > 0.0:
        y = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
        x = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
        start = view.to(tl.int64) * (3 * SIDE * SIDE)
        r, g, b = _blur(in_ptr + start, sigma, y, x, SIDE, RADIUS, TILE)
        inside = tl.trans((y < SIDE) & (x < SIDE))
        pixel_ptr = out_ptr + start + tl.trans(x * SIDE + y)
        dtype = out_ptr.dtype.element_ty
        tl.store(pixel_ptr, tl.trans(r).to(dtype), mask=inside)
        tl.store(pixel_ptr + SIDE * SIDE, tl.trans(g).to(dtype), mask=inside)
        tl.store(pixel_ptr + 2 * SIDE * SIDE, tl.trans(b).to(dtype), mask=inside)


@triton.jit
def blur_rows_kernel(
    in_ptr, out_ptr, params_ptr, scale, offset, SIDE: tl.constexpr, RADIUS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Blur along the rows of planes (V, 3, x, y), then the operations after blur."""
    view = tl.program_id(2)
    row_ptr = params_ptr + view * COLUMNS
    sigma = tl.load(row_ptr + BLUR_SIGMA)
    if sigma > 0.0:
        line = tl.arange(0, TILE)
        top, left = tl.program_id(0) * TILE, tl.program_id(1) * TILE
        planes_ptr = in_ptr + view.to(tl.int64) * (3 * SIDE * SIDE)
        r, g, b = _blur(planes_ptr, sigma, (left + line)[:, None], (top + line)[None, :], SIDE, RADIUS, TILE)
        y, x = (top + line)[:, None], (left + line)[None, :]
        inside = (y < SIDE) & (x < SIDE)
        r, g, b = tl.trans(r), tl.trans(g), tl.trans(b)
        finish(r, g, b, y, x, inside, view, row_ptr, out_ptr, scale, offset, SIDE)
