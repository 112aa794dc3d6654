"""The kernels of `fastmoco.model.batchnorm.triton`.

R rows of a split · C channels · U chunks of its rows

A channels-last batch is a matrix of s·R rows and C columns. Each kernel iterates over tiles of it: program (u, c, g)
has chunk u of split g and block c of the channels. The program that arrives last combines the partial sums of all, in
the order of the chunks, so that the result does not depend on which one that is. All arithmetic is float32, and the
kernels are bound by memory: about ten operations per element read.
"""

# Compile-time constants are in capitals, as is usual in Triton.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from fastmoco.model.batchnorm.triton_joins import join_gradients, join_statistics


@triton.jit
def statistics_kernel(
    x_ptr,
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
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Mean and 1 / sqrt(var + eps) of every split, and the running statistics.

    A chunk is summed in registers, less its first row: sums of x − x₀ and (x − x₀)² over n rows, of which x₀ is one,
    lose at most a factor of n + 1 to cancellation, however large the mean is.
    """
    chunk, split = tl.program_id(0), tl.program_id(2)
    chunks = tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    row = tl.arange(0, BLOCK_R)
    tile = row[:, None] * channels + channel[None, :]
    at = (split.to(tl.int64) * rows + first) * channels
    shift = tl.load(x_ptr + at + channel, mask=valid, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        inside = (row[:, None] < last - start) & valid[None, :]
        x = tl.load(x_ptr + at + tile, mask=inside, other=0.0).to(tl.float32)
        shifted = tl.where(inside, x - shift[None, :], 0.0)
        sums += shifted
        squares += shifted * shifted
        at += BLOCK_R * channels
    count = (last - first).to(tl.float32)
    total = tl.sum(sums, axis=0)
    place = (split * chunks + chunk) * channels + channel
    tl.store(chunk_mean_ptr + place, shift + total / count, mask=valid)
    tl.store(chunk_square_ptr + place, tl.sum(squares, axis=0) - total * total / count, mask=valid)

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
    second_grad_ptr,
    before_relu_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    chunk_sum_ptr,
    chunk_product_ptr,
    sum_ptr,
    product_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    counter_ptr,
    rows,
    channels,
    chunk_rows,
    splits,
    RELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TWICE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Sums of dz and dz · x̂ over every split, where z is the input of the ReLU, and the gradients of weight and bias.

    If the output is used twice, its two gradients are added here. With a residual or two gradients, also dz itself: it
    is the residual's gradient, and the next kernel reads it alone. Without a residual, z follows from x. The last
    program of a split to arrive joins its chunks, and the last split joins the splits.
    """
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=valid, other=0.0)
    slope = scale * tl.load(weight_ptr + channel, mask=valid, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=valid, other=0.0)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    row = tl.arange(0, BLOCK_R)
    tile = row[:, None] * channels + channel[None, :]
    at = (split.to(tl.int64) * rows + first) * channels
    for start in range(first, last, BLOCK_R):
        inside = (row[:, None] < last - start) & valid[None, :]
        centred = tl.load(x_ptr + at + tile, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        grad = tl.load(grad_ptr + at + tile, mask=inside, other=0.0)
        if TWICE:
            second = tl.load(second_grad_ptr + at + tile, mask=inside, other=0.0).to(tl.float32)
            grad = (grad.to(tl.float32) + second).to(grad_ptr.dtype.element_ty)  # rounded as torch's addition is
        if RELU:
            if RESIDUAL:
                inactive = tl.load(y_ptr + at + tile, mask=inside, other=0.0).to(tl.float32) <= 0.0
            else:
                inactive = centred * slope[None, :] + bias[None, :] <= 0.0
            grad = tl.where(inactive, 0.0, grad.to(tl.float32)).to(grad_ptr.dtype.element_ty)
        if (RELU and RESIDUAL) or TWICE:
            tl.store(before_relu_ptr + at + tile, grad, mask=inside)
        grad = grad.to(tl.float32)
        sums += grad
        products += grad * centred
        at += BLOCK_R * channels
    join_gradients(
        tl.sum(sums, axis=0),
        tl.sum(products, axis=0) * scale,
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
