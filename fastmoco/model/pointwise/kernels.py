"""The kernels of `fastmoco.model.pointwise.op`: matrix products over the pixels of a channels-last batch.

R rows (pixels) of a split · I input channels · O output channels · U chunks of its rows

A channels-last batch is a matrix of s·R rows. Program (u, c, g) has chunk u of split g and block c of the
output's columns; it iterates over tiles of rows, and in each over the columns of the input. Sums over
the rows are joined by the program that arrives last, as in `fastmoco.model.batchnorm.triton_joins`.
"""

# Compile-time constants are in capitals, as is usual in Triton.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from fastmoco.model.batchnorm.triton_joins import join_statistics


@triton.jit
def multiply_add(a, b, accumulator, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b + accumulator; converted for Triton's interpreter, which multiplies the bit patterns of bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def normalised(x, mean_ptr, scale_ptr, weight_ptr, bias_ptr, split, channel, channels):
    """weight · x̂ + bias of a tile in float32, as `triton_kernels.normalise_kernel` computes it."""
    valid = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=valid, other=0.0)
    scale *= tl.load(weight_ptr + channel, mask=valid, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0)
    return (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def _merge_tiles(
    tile_mean_ptr,
    tile_square_ptr,
    chunk_mean_ptr,
    chunk_square_ptr,
    first_tile,
    rows,
    channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Mean and sum of squared deviations of this program's chunk, from those of its tiles (see `join_statistics`)."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    tiles = tl.cdiv(rows, BLOCK_R)
    u = tl.arange(0, BLOCK_U)
    tl.debug_barrier()  # the tiles' were stored by other threads
    weighted = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_U):
        tile = (start + u)[:, None]
        mask = (tile < tiles) & valid[None, :]
        means = tl.load(tile_mean_ptr + (first_tile + tile) * channels + channel[None, :], mask=mask, other=0.0)
        weighted += means * tl.minimum(rows - tile * BLOCK_R, BLOCK_R).to(tl.float32)
    mean = tl.sum(weighted, axis=0) / rows
    joined = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_U):
        tile = (start + u)[:, None]
        mask = (tile < tiles) & valid[None, :]
        place = (first_tile + tile) * channels + channel[None, :]
        delta = tl.where(mask, tl.load(tile_mean_ptr + place, mask=mask, other=0.0) - mean[None, :], 0.0)
        joined += delta * delta * tl.minimum(rows - tile * BLOCK_R, BLOCK_R).to(tl.float32)
        joined += tl.load(tile_square_ptr + place, mask=mask, other=0.0)
    chunk = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    tl.store(chunk_mean_ptr + chunk * channels + channel, mean, mask=valid)
    tl.store(chunk_square_ptr + chunk * channels + channel, tl.sum(joined, axis=0), mask=valid)


@triton.jit
def product_kernel(
    x_ptr,
    residual_ptr,
    activated_ptr,
    matrix_ptr,
    y_ptr,
    before_mean_ptr,
    before_scale_ptr,
    before_weight_ptr,
    before_bias_ptr,
    tile_mean_ptr,
    tile_square_ptr,
    chunk_mean_ptr,
    chunk_square_ptr,
    mean_ptr,
    scale_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    rows,
    inner,
    channels,
    chunk_rows,
    splits,
    momentum,
    eps,
    ACTIVATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """y = f(x) @ matrixᵀ, with f the batch norm and ReLU before it, if any, and the statistics of every split of y.

    matrix (O, I). With a residual, which is added before the ReLU, f(x) is stored, for its other uses. The statistics
    are those of y as stored. Each tile's mean comes first and its squares are of the distances to it; tiles are then
    merged as chunks are (Chan, Golub and LeVeque 1983), so that a large mean does not cancel.
    """
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    row = tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_I)
    at = split.to(tl.int64) * rows + first
    first_tile = split * tl.cdiv(rows, BLOCK_R) + first // BLOCK_R
    number = first_tile
    for start in range(first, last, BLOCK_R):
        inside = row < last - start
        y = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for i in range(0, inner, BLOCK_I):
            here = i + column
            tile = at * inner + row[:, None] * inner + here[None, :]
            filled = inside[:, None] & (here < inner)[None, :]
            x = tl.load(x_ptr + tile, mask=filled, other=0.0)
            if ACTIVATE:
                z = normalised(
                    x, before_mean_ptr, before_scale_ptr, before_weight_ptr, before_bias_ptr, split, here, inner
                )
                if RESIDUAL:
                    z += tl.load(residual_ptr + tile, mask=filled, other=0.0).to(tl.float32)
                x = tl.where(z < 0.0, 0.0, z).to(x.dtype)  # unlike a maximum, this keeps NaN
                if RESIDUAL:
                    tl.store(
                        activated_ptr + tile, x, mask=filled & (row + tl.program_id(1) * BLOCK_R < BLOCK_R)[:, None]
                    )
            matrix = tl.load(
                matrix_ptr + channel[:, None] * inner + here[None, :],
                mask=valid[:, None] & (here < inner)[None, :],
                other=0.0,
            )
            y = multiply_add(x, tl.trans(matrix), y, PRECISION, WIDEN)
        stored = y.to(y_ptr.dtype.element_ty)
        tl.store(
            y_ptr + at * channels + row[:, None] * channels + channel[None, :],
            stored,
            mask=inside[:, None] & valid[None, :],
        )
        y = tl.where(inside[:, None], stored.to(tl.float32), 0.0)
        count = tl.minimum(last - start, BLOCK_R).to(tl.float32)
        tile_mean = tl.sum(y, axis=0) / count
        centred = tl.where(inside[:, None], y - tile_mean[None, :], 0.0)
        tile_square = tl.sum(centred * centred, axis=0)
        tl.store(tile_mean_ptr + number * channels + channel, tile_mean, mask=valid)
        tl.store(tile_square_ptr + number * channels + channel, tile_square, mask=valid)
        at += BLOCK_R
        number += 1
    _merge_tiles(
        tile_mean_ptr,
        tile_square_ptr,
        chunk_mean_ptr,
        chunk_square_ptr,
        first_tile,
        last - first,
        channels,
        BLOCK_R,
        BLOCK_C,
        BLOCK_U,
    )
    join_statistics(
        chunk_mean_ptr,
        chunk_square_ptr,
        mean_ptr,
        scale_ptr,
        running_mean_ptr,
        running_var_ptr,
        counter_ptr,
        rows,
        channels,
        chunk_rows,
        splits,
        momentum,
        eps,
        BLOCK_C,
        BLOCK_U,
        SPLITS,
    )
