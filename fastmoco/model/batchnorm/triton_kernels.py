"""The kernels of `fastmoco.model.batchnorm.triton`.

R rows of a split · C channels · U chunks of its rows

A channels-last batch is a matrix of s·R rows and C columns. Every kernel walks over tiles of it: program (u, c, g) owns
chunk u of split g, and a block c of the channels. Two small kernels join what the chunks summed. All arithmetic is
float32, and all large ones are bound by memory: some ten operations on each element that is read.
"""

# Compile-time constants stand in capitals, as everywhere in Triton.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def statistics_kernel(
    x_ptr, mean_ptr, square_ptr, rows, channels, chunk_rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and sum of squared deviations of every chunk, in one pass that survives a mean far larger than the spread:
    two passes over a tile in registers, and Chan's formula from tile to tile (Chan, Golub and LeVeque 1983)."""
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    first = chunk * chunk_rows
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & (channel[None, :] < channels)
        place = (row.to(tl.int64) + split.to(tl.int64) * rows)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        here = tl.minimum(rows - start, BLOCK_R).to(tl.float32)
        tile_mean = tl.sum(x, axis=0) / here
        apart = tl.where(inside, x - tile_mean[None, :], 0.0)
        gap = tile_mean - mean
        share = here / (count + here)
        mean += gap * share
        square += tl.sum(apart * apart, axis=0) + gap * gap * (count * share)
        count += here
    place = (split * tl.num_programs(0) + chunk) * channels + channel
    tl.store(mean_ptr + place, mean, mask=channel < channels)
    tl.store(square_ptr + place, square, mask=channel < channels)


@triton.jit
def join_statistics_kernel(
    chunk_mean_ptr,
    chunk_square_ptr,
    mean_ptr,
    scale_ptr,
    running_mean_ptr,
    running_var_ptr,
    splits,
    chunks,
    rows,
    channels,
    chunk_rows,
    momentum,
    eps,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and 1/deviation of every split from its chunks, and the running statistics."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split, chunk = tl.arange(0, SPLITS), tl.arange(0, CHUNKS)
    place = (split[:, None, None] * chunks + chunk[None, :, None]) * channels + channel[None, None, :]
    inside = (split[:, None, None] < splits) & (chunk[None, :, None] < chunks) & (channel[None, None, :] < channels)
    means = tl.load(chunk_mean_ptr + place, mask=inside, other=0.0)
    squares = tl.load(chunk_square_ptr + place, mask=inside, other=0.0)
    # rows of each chunk: the last has what is left, those beyond it none
    count = tl.minimum(tl.maximum(rows - chunk * chunk_rows, 0), chunk_rows).to(tl.float32)[None, :, None]
    mean = tl.sum(means * count, axis=1) / rows
    apart = means - mean[:, None, :]
    square = tl.sum(squares + apart * apart * count, axis=1)

    split_place = split[:, None] * channels + channel[None, :]
    split_inside = (split[:, None] < splits) & (channel[None, :] < channels)
    tl.store(mean_ptr + split_place, mean, mask=split_inside)
    tl.store(scale_ptr + split_place, 1.0 / tl.sqrt_rn(square / rows + eps), mask=split_inside)

    known = channel < channels
    batch_mean = tl.sum(tl.where(split_inside, mean, 0.0), axis=0) / splits
    batch_var = tl.sum(tl.where(split_inside, square, 0.0), axis=0) / splits / (rows - 1)
    running_mean = tl.load(running_mean_ptr + channel, mask=known, other=0.0)
    running_var = tl.load(running_var_ptr + channel, mask=known, other=0.0)
    tl.store(running_mean_ptr + channel, (1.0 - momentum) * running_mean + momentum * batch_mean, mask=known)
    tl.store(running_var_ptr + channel, (1.0 - momentum) * running_var + momentum * batch_var, mask=known)


@triton.jit
def normalise_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    channels,
    chunk_rows,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=known, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=known, other=0.0)
    scale *= tl.load(weight_ptr + channel, mask=known, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
    first = chunk * chunk_rows
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & (channel[None, :] < channels)
        place = (row.to(tl.int64) + split.to(tl.int64) * rows)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        # the mean is taken off first: folded into the bias it would cancel where it is far larger than the spread
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if RESIDUAL:
            y += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # unlike a maximum, this keeps NaN
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums_kernel(
    x_ptr,
    y_ptr,
    grad_ptr,
    before_relu_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    product_ptr,
    rows,
    channels,
    chunk_rows,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dz and dz · x̂ over every chunk, where z is what enters the ReLU, and dz itself where there is a residual:
    it is the residual's gradient, and saves the next kernel from reading y and dy. Without one, z follows from x."""
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=known, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=known, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    product = tl.zeros((BLOCK_C,), tl.float32)
    first = chunk * chunk_rows
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & (channel[None, :] < channels)
        place = (row.to(tl.int64) + split.to(tl.int64) * rows)[:, None] * channels + channel[None, :]
        apart = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
        if RELU:
            if RESIDUAL:
                dead = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32) <= 0.0
            else:
                dead = apart * (scale * weight)[None, :] + bias[None, :] <= 0.0
            grad = tl.where(dead, 0.0, grad.to(tl.float32)).to(grad_ptr.dtype.element_ty)
            if RESIDUAL:
                tl.store(before_relu_ptr + place, grad, mask=inside)
        wide = grad.to(tl.float32)
        total += tl.sum(wide, axis=0)
        product += tl.sum(wide * apart, axis=0)
    place = (split * tl.num_programs(0) + chunk) * channels + channel
    tl.store(sum_ptr + place, total, mask=known)
    tl.store(product_ptr + place, product * scale, mask=known)


@triton.jit
def join_gradients_kernel(
    chunk_sum_ptr,
    chunk_product_ptr,
    sum_ptr,
    product_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    splits,
    chunks,
    channels,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split, chunk = tl.arange(0, SPLITS), tl.arange(0, CHUNKS)
    place = (split[:, None, None] * chunks + chunk[None, :, None]) * channels + channel[None, None, :]
    inside = (split[:, None, None] < splits) & (chunk[None, :, None] < chunks) & (channel[None, None, :] < channels)
    total = tl.sum(tl.load(chunk_sum_ptr + place, mask=inside, other=0.0), axis=1)
    product = tl.sum(tl.load(chunk_product_ptr + place, mask=inside, other=0.0), axis=1)
    split_place = split[:, None] * channels + channel[None, :]
    split_inside = (split[:, None] < splits) & (channel[None, :] < channels)
    tl.store(sum_ptr + split_place, total, mask=split_inside)
    tl.store(product_ptr + split_place, product, mask=split_inside)
    tl.store(bias_grad_ptr + channel, tl.sum(total, axis=0), mask=channel < channels)
    tl.store(weight_grad_ptr + channel, tl.sum(product, axis=0), mask=channel < channels)


@triton.jit
def input_gradient_kernel(
    x_ptr,
    grad_ptr,
    x_grad_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    product_ptr,
    rows,
    channels,
    chunk_rows,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = weight / deviation · (dz − mean(dz) − x̂ · mean(dz · x̂)), means over the split."""
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=known, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=known, other=0.0)
    slope = scale * tl.load(weight_ptr + channel, mask=known, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0)
    mean_grad = tl.load(sum_ptr + split * channels + channel, mask=known, other=0.0) / rows
    lean = tl.load(product_ptr + split * channels + channel, mask=known, other=0.0) / rows * scale
    first = chunk * chunk_rows
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & (channel[None, :] < channels)
        place = (row.to(tl.int64) + split.to(tl.int64) * rows)[:, None] * channels + channel[None, :]
        apart = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            grad = tl.where(apart * slope[None, :] + bias[None, :] <= 0.0, 0.0, grad)
        x_grad = slope[None, :] * (grad - mean_grad[None, :] - apart * lean[None, :])
        tl.store(x_grad_ptr + place, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
