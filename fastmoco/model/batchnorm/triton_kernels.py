"""The kernels of `fastmoco.model.batchnorm.triton`.

R rows of a split · C channels · U chunks of its rows

A channels-last batch is a matrix of s·R rows and C columns. Each kernel iterates over tiles of it: program (u, c, g)
has chunk u of split g and block c of the channels. Two small kernels combine the partial sums of the chunks. All
arithmetic is float32, and the large kernels are bound by memory: about ten operations per element read.
"""

# Compile-time constants are in capitals, as is usual in Triton.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def statistics_kernel(
    x_ptr, mean_ptr, square_ptr, rows, channels, chunk_rows, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and sum of squared deviations of every chunk, in one pass that is accurate for a mean far above the spread:
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
        offset = (row.to(tl.int64) + split.to(tl.int64) * rows)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        tile_count = tl.minimum(rows - start, BLOCK_R).to(tl.float32)
        tile_mean = tl.sum(x, axis=0) / tile_count
        centred = tl.where(inside, x - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        fraction = tile_count / (count + tile_count)
        mean += delta * fraction
        square += tl.sum(centred * centred, axis=0) + delta * delta * (count * fraction)
        count += tile_count
    offset = (split * tl.num_programs(0) + chunk) * channels + channel
    tl.store(mean_ptr + offset, mean, mask=channel < channels)
    tl.store(square_ptr + offset, square, mask=channel < channels)


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
    """Mean and 1 / sqrt(var + eps) of every split from those of its chunks, and the running statistics."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split, chunk = tl.arange(0, SPLITS), tl.arange(0, CHUNKS)
    offset = (split[:, None, None] * chunks + chunk[None, :, None]) * channels + channel[None, None, :]
    inside = (split[:, None, None] < splits) & (chunk[None, :, None] < chunks) & (channel[None, None, :] < channels)
    means = tl.load(chunk_mean_ptr + offset, mask=inside, other=0.0)
    squares = tl.load(chunk_square_ptr + offset, mask=inside, other=0.0)
    # rows of each chunk: the last has the remainder, those after it none
    count = tl.minimum(tl.maximum(rows - chunk * chunk_rows, 0), chunk_rows).to(tl.float32)[None, :, None]
    mean = tl.sum(means * count, axis=1) / rows
    delta = means - mean[:, None, :]
    square = tl.sum(squares + delta * delta * count, axis=1)

    split_offset = split[:, None] * channels + channel[None, :]
    split_inside = (split[:, None] < splits) & (channel[None, :] < channels)
    tl.store(mean_ptr + split_offset, mean, mask=split_inside)
    tl.store(scale_ptr + split_offset, 1.0 / tl.sqrt_rn(square / rows + eps), mask=split_inside)

    valid = channel < channels
    batch_mean = tl.sum(tl.where(split_inside, mean, 0.0), axis=0) / splits
    batch_var = tl.sum(tl.where(split_inside, square, 0.0), axis=0) / splits / (rows - 1)
    running_mean = tl.load(running_mean_ptr + channel, mask=valid, other=0.0)
    running_var = tl.load(running_var_ptr + channel, mask=valid, other=0.0)
    tl.store(running_mean_ptr + channel, (1.0 - momentum) * running_mean + momentum * batch_mean, mask=valid)
    tl.store(running_var_ptr + channel, (1.0 - momentum) * running_var + momentum * batch_var, mask=valid)


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
    valid = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=valid, other=0.0)
    scale *= tl.load(weight_ptr + channel, mask=valid, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0)
    first = chunk * chunk_rows
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & (channel[None, :] < channels)
        offset = (row.to(tl.int64) + split.to(tl.int64) * rows)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        # the mean is subtracted first: folded into the bias it would cancel if it is far larger than the spread
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if RESIDUAL:
            y += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # unlike a maximum, this keeps NaN
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


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
    """Sums of dz and dz · x̂ over every chunk, where z is the input of the ReLU. With a residual, also dz itself: it is
    the residual's gradient, and the next kernel need not read y and dy. Without a residual, z follows from x."""
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=valid, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=valid, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    product = tl.zeros((BLOCK_C,), tl.float32)
    first = chunk * chunk_rows
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & (channel[None, :] < channels)
        offset = (row.to(tl.int64) + split.to(tl.int64) * rows)[:, None] * channels + channel[None, :]
        centred = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0)
        if RELU:
            if RESIDUAL:
                inactive = tl.load(y_ptr + offset, mask=inside, other=0.0).to(tl.float32) <= 0.0
            else:
                inactive = centred * (scale * weight)[None, :] + bias[None, :] <= 0.0
            grad = tl.where(inactive, 0.0, grad.to(tl.float32)).to(grad_ptr.dtype.element_ty)
            if RESIDUAL:
                tl.store(before_relu_ptr + offset, grad, mask=inside)
        grad = grad.to(tl.float32)
        total += tl.sum(grad, axis=0)
        product += tl.sum(grad * centred, axis=0)
    offset = (split * tl.num_programs(0) + chunk) * channels + channel
    tl.store(sum_ptr + offset, total, mask=valid)
    tl.store(product_ptr + offset, product * scale, mask=valid)


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
    offset = (split[:, None, None] * chunks + chunk[None, :, None]) * channels + channel[None, None, :]
    inside = (split[:, None, None] < splits) & (chunk[None, :, None] < chunks) & (channel[None, None, :] < channels)
    total = tl.sum(tl.load(chunk_sum_ptr + offset, mask=inside, other=0.0), axis=1)
    product = tl.sum(tl.load(chunk_product_ptr + offset, mask=inside, other=0.0), axis=1)
    split_offset = split[:, None] * channels + channel[None, :]
    split_inside = (split[:, None] < splits) & (channel[None, :] < channels)
    tl.store(sum_ptr + split_offset, total, mask=split_inside)
    tl.store(product_ptr + split_offset, product, mask=split_inside)
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
    """dx = weight / sqrt(var + eps) · (dz − mean(dz) − x̂ · mean(dz · x̂)), means over the split."""
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=valid, other=0.0)
    slope = scale * tl.load(weight_ptr + channel, mask=valid, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0)
    mean_grad = tl.load(sum_ptr + split * channels + channel, mask=valid, other=0.0) / rows
    mean_product = tl.load(product_ptr + split * channels + channel, mask=valid, other=0.0) / rows * scale
    first = chunk * chunk_rows
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & (channel[None, :] < channels)
        offset = (row.to(tl.int64) + split.to(tl.int64) * rows)[:, None] * channels + channel[None, :]
        centred = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            grad = tl.where(centred * slope[None, :] + bias[None, :] <= 0.0, 0.0, grad)
        x_grad = slope[None, :] * (grad - mean_grad[None, :] - centred * mean_product[None, :])
        tl.store(x_grad_ptr + offset, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
