"""The kernels of `fastmoco.model.batchnorm.triton_pool`.

H, W sides before pooling · P, Q sides after · a window has 3×3 taps, numbered row by row
"""

# Compile-time constants are in capitals, as is usual in Triton.
# ruff: noqa: N803
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from fastmoco.model.batchnorm.triton_joins import join_gradients

TAPS = tl.constexpr(9)  # also the number that stands for "no tap": a window without a value above 0


@triton.jit
def normalise_pool_kernel(
    x_ptr,
    y_ptr,
    tap_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    channels,
    chunk_rows,
    height,
    width,
    pooled_height,
    pooled_width,
    TAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The largest of relu(weight · x̂ + bias) in every window and, with TAP, which tap that is: the first, if several.

    Values are compared as rounded to the type of y, so that the tap is that of a pooling after the rounding. Rows are
    those of the output. NaN is passed on.
    """
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
        inside = (row[:, None] < rows) & valid[None, :]
        place = row.to(tl.int64) + split.to(tl.int64) * rows
        image, top = place // (pooled_height * pooled_width), place // pooled_width % pooled_height * 2 - 1
        left = place % pooled_width * 2 - 1
        largest = tl.full((BLOCK_R, BLOCK_C), float("-inf"), tl.float32)
        tap = tl.full((BLOCK_R, BLOCK_C), TAPS, tl.int32)
        for number in tl.static_range(TAPS):
            i, j = top + number // 3, left + number % 3
            here = inside & ((i >= 0) & (i < height) & (j >= 0) & (j < width))[:, None]
            offset = ((image * height + i) * width + j)[:, None] * channels + channel[None, :]
            x = tl.load(x_ptr + offset, mask=here, other=0.0).to(tl.float32)
            value = ((x - mean[None, :]) * scale[None, :] + bias[None, :]).to(y_ptr.dtype.element_ty).to(tl.float32)
            larger = here & ((value > largest) | (value != value))
            largest = tl.where(larger, value, largest)
            tap = tl.where(larger, number, tap)
        offset = place[:, None] * channels + channel[None, :]
        tl.store(y_ptr + offset, tl.where(largest < 0.0, 0.0, largest).to(y_ptr.dtype.element_ty), mask=inside)
        if TAP:
            tl.store(tap_ptr + offset, tl.where(largest <= 0.0, TAPS, tap).to(tl.uint8), mask=inside)


@triton.jit
def pool_gradient_sums_kernel(
    x_ptr,
    tap_ptr,
    grad_ptr,
    second_grad_ptr,
    total_grad_ptr,
    mean_ptr,
    scale_ptr,
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
    height,
    width,
    pooled_height,
    pooled_width,
    TWICE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Sums of dz and dz · x̂ as in `gradient_sums_kernel`, where every window passes its gradient to one x.

    If the output is used twice, also the sum of its two gradients. Rows are those of the output.
    """
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=valid, other=0.0)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = chunk * chunk_rows
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & valid[None, :]
        place = row.to(tl.int64) + split.to(tl.int64) * rows
        offset = place[:, None] * channels + channel[None, :]
        grad = tl.load(grad_ptr + offset, mask=inside, other=0.0)
        if TWICE:
            second = tl.load(second_grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            grad = (grad.to(tl.float32) + second).to(grad_ptr.dtype.element_ty)  # rounded as torch's addition is
            tl.store(total_grad_ptr + offset, grad, mask=inside)
        tap = tl.load(tap_ptr + offset, mask=inside, other=TAPS).to(tl.int32)
        chosen = inside & (tap < TAPS)
        image, top = place // (pooled_height * pooled_width), place // pooled_width % pooled_height * 2 - 1
        left = place % pooled_width * 2 - 1
        i, j = top[:, None] + tap // 3, left[:, None] + tap % 3
        source = ((image[:, None] * height + i) * width + j) * channels + channel[None, :]
        centred = tl.load(x_ptr + source, mask=chosen, other=0.0).to(tl.float32) - mean[None, :]
        grad = tl.where(chosen, grad.to(tl.float32), 0.0)
        sums += grad
        products += grad * centred
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
def pool_input_gradient_kernel(
    x_ptr,
    tap_ptr,
    grad_ptr,
    x_grad_ptr,
    mean_ptr,
    scale_ptr,
    weight_ptr,
    sum_ptr,
    product_ptr,
    rows,
    channels,
    chunk_rows,
    height,
    width,
    pooled_height,
    pooled_width,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx as in `input_gradient_kernel`, where dz is the sum over the windows, at most four, that chose this x.

    Rows are those of x.
    """
    chunk, split = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    mean = tl.load(mean_ptr + split * channels + channel, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + split * channels + channel, mask=valid, other=0.0)
    slope = scale * tl.load(weight_ptr + channel, mask=valid, other=0.0)
    mean_grad = tl.load(sum_ptr + split * channels + channel, mask=valid, other=0.0) / rows
    mean_product = tl.load(product_ptr + split * channels + channel, mask=valid, other=0.0) / rows * scale
    first = chunk * chunk_rows
    for start in range(first, tl.minimum(first + chunk_rows, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row[:, None] < rows) & valid[None, :]
        place = row.to(tl.int64) + split.to(tl.int64) * rows
        image, i, j = place // (height * width), place // width % height, place % width
        grad = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for number in tl.static_range(4):
            # an even i is the middle row of window i/2; an odd one the first of a window and the last of the one before
            p, q = (i + 1) // 2 - number // 2, (j + 1) // 2 - number % 2
            down, right = i - 2 * p + 1, j - 2 * q + 1
            exists = (p >= 0) & (p < pooled_height) & (down < 3) & (q >= 0) & (q < pooled_width) & (right < 3)
            here = inside & exists[:, None]
            window = ((image * pooled_height + p) * pooled_width + q)[:, None] * channels + channel[None, :]
            chosen = tl.load(tap_ptr + window, mask=here, other=TAPS).to(tl.int32) == (3 * down + right)[:, None]
            grad += tl.load(grad_ptr + window, mask=here & chosen, other=0.0).to(tl.float32)
        grad = grad.to(grad_ptr.dtype.element_ty).to(tl.float32)
        offset = place[:, None] * channels + channel[None, :]
        centred = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        x_grad = slope[None, :] * (grad - mean_grad[None, :] - centred * mean_product[None, :])
        tl.store(x_grad_ptr + offset, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
