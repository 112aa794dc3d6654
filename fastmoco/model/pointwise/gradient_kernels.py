"""The kernels of the backward of `fastmoco.model.pointwise.op`; see `kernels` for how the work is divided."""

# Compile-time constants are in capitals, as is usual in Triton.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from fastmoco.model.batchnorm.triton_joins import join_gradients
from fastmoco.model.pointwise.kernels import multiply_add, normalised


@triton.jit
def _sum_of_tiles(tile_sum_ptr, first_tile, tiles, channels, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr):
    """The sum over this program's tiles of what each has stored."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_U):
        tile = (start + tl.arange(0, BLOCK_U))[:, None]
        mask = (tile < tiles) & (channel < channels)[None, :]
        place = (first_tile + tile) * channels + channel[None, :]
        total += tl.load(tile_sum_ptr + place, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def product_gradient_kernel(
    grad_ptr,
    matrix_ptr,
    x_ptr,
    activated_ptr,
    second_grad_ptr,
    x_grad_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    tile_sum_ptr,
    tile_product_ptr,
    chunk_sum_ptr,
    chunk_product_ptr,
    sum_ptr,
    product_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    counter_ptr,
    rows,
    inner,
    channels,
    chunk_rows,
    splits,
    RESIDUAL: tl.constexpr,
    TWICE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """dz = grad @ matrix where z is positive, else 0: the gradient before the ReLU of f(x) = relu(z).

    z = weight · x̂ + bias, or with a residual their sum, whose sign is that of the stored f(x). matrix (I, O), with I
    the columns of grad and O those of x. If f(x) has another use, its gradient is added. Also the sums of dz and dz · x̂
    over every split, and the gradients of weight and bias, as in `triton_kernels.gradient_sums_kernel`.
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
        dz = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for i in range(0, inner, BLOCK_I):
            here = i + column
            grad = tl.load(
                grad_ptr + at * inner + row[:, None] * inner + here[None, :],
                mask=inside[:, None] & (here < inner)[None, :],
                other=0.0,
            )
            matrix = tl.load(
                matrix_ptr + here[:, None] * channels + channel[None, :],
                mask=(here < inner)[:, None] & valid[None, :],
                other=0.0,
            )
            dz = multiply_add(grad, matrix, dz, PRECISION, WIDEN)
        tile = row[:, None] * channels + channel[None, :]
        filled = inside[:, None] & valid[None, :]
        if TWICE:
            dz += tl.load(second_grad_ptr + at * channels + tile, mask=filled, other=0.0).to(tl.float32)
        # not before the loops, throughout which each thread would hold a quarter of the columns
        mean = tl.load(mean_ptr + split * channels + channel, mask=valid, other=0.0)
        centred = tl.load(x_ptr + at * channels + tile, mask=filled, other=0.0).to(tl.float32) - mean[None, :]
        if RESIDUAL:
            inactive = tl.load(activated_ptr + at * channels + tile, mask=filled, other=0.0).to(tl.float32) <= 0.0
        else:
            slope = tl.load(scale_ptr + split * channels + channel, mask=valid, other=0.0)
            slope *= tl.load(weight_ptr + channel, mask=valid, other=0.0)
            bias = tl.load(bias_ptr + channel, mask=valid, other=0.0)
            inactive = centred * slope[None, :] + bias[None, :] <= 0.0
        stored = tl.where(inactive, 0.0, dz).to(x_grad_ptr.dtype.element_ty)
        tl.store(x_grad_ptr + at * channels + tile, stored, mask=filled)
        dz = tl.where(inside[:, None], stored.to(tl.float32), 0.0)
        tl.store(tile_sum_ptr + number * channels + channel, tl.sum(dz, axis=0), mask=valid)
        tl.store(tile_product_ptr + number * channels + channel, tl.sum(dz * centred, axis=0), mask=valid)
        at += BLOCK_R
        number += 1
    tl.debug_barrier()  # the tiles' sums were stored by other threads
    total = _sum_of_tiles(tile_sum_ptr, first_tile, number - first_tile, channels, BLOCK_C, BLOCK_U)
    product = _sum_of_tiles(tile_product_ptr, first_tile, number - first_tile, channels, BLOCK_C, BLOCK_U)
    scale = tl.load(scale_ptr + split * channels + channel, mask=valid, other=0.0)
    join_gradients(
        total,
        product * scale,
        chunk_sum_ptr,
        chunk_product_ptr,
        sum_ptr,
        product_ptr,
        weight_grad_ptr,
        bias_grad_ptr,
        counter_ptr,
        channels,
        splits,
        BLOCK_C,
        BLOCK_U,
        SPLITS,
    )


@triton.jit
def matrix_gradient_kernel(
    grad_ptr,
    x_ptr,
    partial_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    outer,
    channels,
    blocks,
    chunk_blocks,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Parts of gradᵀ @ relu(weight · x̂ + bias), each over a chunk of the rows of all splits.

    grad has `outer` columns, x has `channels`. A split has a whole number of blocks of rows, `blocks` in all.
    """
    chunk = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    of_split = tl.cdiv(rows, BLOCK_R)
    total = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    first = chunk * chunk_blocks
    for block in range(first, tl.minimum(first + chunk_blocks, blocks)):
        split, start = block // of_split, block % of_split * BLOCK_R
        at = split * rows + start
        inside = row < rows - start
        grad = tl.load(
            grad_ptr + at * outer + row[:, None] * outer + out[None, :],
            mask=inside[:, None] & (out < outer)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + at * channels + row[:, None] * channels + channel[None, :],
            mask=inside[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        z = normalised(x, mean_ptr, scale_ptr, weight_ptr, bias_ptr, split, channel, channels)
        x = tl.where(z < 0.0, 0.0, z).to(x.dtype)
        total = multiply_add(tl.trans(grad), x, total, PRECISION, WIDEN)
    place = chunk * outer * channels + out[:, None] * channels + channel[None, :]
    tl.store(partial_ptr + place, total, mask=(out < outer)[:, None] & (channel < channels)[None, :])


@triton.jit
def join_parts_kernel(partial_ptr, sum_ptr, size, chunks, BLOCK: tl.constexpr):
    """The sum of all parts of a matrix, in the order of the chunks."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(chunks):
        total += tl.load(partial_ptr + place, mask=place < size, other=0.0)
        partial_ptr += size
    tl.store(sum_ptr + place, total.to(sum_ptr.dtype.element_ty), mask=place < size)
