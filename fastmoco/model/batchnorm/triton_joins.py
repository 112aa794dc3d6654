"""The ends of the batch norm kernels that sum: the program that arrives last joins what the others have stored.

A launch has programs (u, c, g): chunk u of split g, and block c of the channels. Of each block, the last program of a
split joins the chunks of that split, and the last of these joins the splits. Each join is in the order of the chunks,
so that its bits do not depend on which program does it.
"""

# Compile-time constants are in capitals, as is usual in Triton.
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_last(counter_ptr, programs):
    """Whether this is the last of `programs` programs that call this; what the others stored before is then visible.

    The counter starts at 0 and ends there, ready for the next launch.
    """
    tl.debug_barrier()  # the stores of all threads come before the one thread's atomic addition
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def join_statistics(
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
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Mean and 1 / sqrt(var + eps) of a split from those of its chunks (Chan, Golub and LeVeque 1983), and the running
    statistics from those of the splits."""
    split, chunks = tl.program_id(2), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    if is_last(counter_ptr + split * tl.num_programs(1) + tl.program_id(1), chunks):
        u = tl.arange(0, BLOCK_U)
        first_place = split * chunks * channels + channel
        weighted = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
        for start in range(0, chunks, BLOCK_U):
            part = (start + u)[:, None]
            mask = (part < chunks) & valid[None, :]
            means = tl.load(chunk_mean_ptr + first_place[None, :] + part * channels, mask=mask, other=0.0)
            weighted += means * tl.minimum(rows - part * chunk_rows, chunk_rows).to(tl.float32)
        mean = tl.sum(weighted, axis=0) / rows
        joined = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
        for start in range(0, chunks, BLOCK_U):
            part = (start + u)[:, None]
            mask = (part < chunks) & valid[None, :]
            means = tl.load(chunk_mean_ptr + first_place[None, :] + part * channels, mask=mask, other=0.0)
            delta = tl.where(mask, means - mean[None, :], 0.0)
            joined += delta * delta * tl.minimum(rows - part * chunk_rows, chunk_rows).to(tl.float32)
            joined += tl.load(chunk_square_ptr + first_place[None, :] + part * channels, mask=mask, other=0.0)
        square = tl.sum(joined, axis=0)
        tl.store(mean_ptr + split * channels + channel, mean, mask=valid)
        tl.store(scale_ptr + split * channels + channel, 1.0 / tl.sqrt_rn(square / rows + eps), mask=valid)
        tl.debug_barrier()  # all have read the first chunk's
        tl.store(chunk_square_ptr + first_place, square, mask=valid)

        if is_last(counter_ptr + splits * tl.num_programs(1) + tl.program_id(1), splits):
            group = tl.arange(0, SPLITS)
            mask = (group[:, None] < splits) & valid[None, :]
            means = tl.load(mean_ptr + group[:, None] * channels + channel[None, :], mask=mask, other=0.0)
            place = group[:, None] * chunks * channels + channel[None, :]
            variances = tl.load(chunk_square_ptr + place, mask=mask, other=0.0) / (rows - 1)
            running_mean = tl.load(running_mean_ptr + channel, mask=valid, other=0.0)
            running_var = tl.load(running_var_ptr + channel, mask=valid, other=0.0)
            running_mean = (1.0 - momentum) * running_mean + momentum * (tl.sum(means, axis=0) / splits)
            running_var = (1.0 - momentum) * running_var + momentum * (tl.sum(variances, axis=0) / splits)
            tl.store(running_mean_ptr + channel, running_mean, mask=valid)
            tl.store(running_var_ptr + channel, running_var, mask=valid)


@triton.jit
def join_gradients(
    total,
    product,
    chunk_sum_ptr,
    chunk_product_ptr,
    sum_ptr,
    product_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    counter_ptr,
    channels,
    splits,
    BLOCK_C: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store the two sums of a chunk; in the last program of a split also the sums of its chunks, and in that of the
    last split those of all splits."""
    split, chunks = tl.program_id(2), tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    place = (split * chunks + tl.program_id(0)) * channels + channel
    tl.store(chunk_sum_ptr + place, total, mask=valid)
    tl.store(chunk_product_ptr + place, product, mask=valid)
    if is_last(counter_ptr + split * tl.num_programs(1) + tl.program_id(1), chunks):
        u = tl.arange(0, BLOCK_U)
        sums = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
        products = tl.zeros((BLOCK_U, BLOCK_C), tl.float32)
        for start in range(0, chunks, BLOCK_U):
            part = (start + u)[:, None]
            mask = (part < chunks) & valid[None, :]
            places = (split * chunks + part) * channels + channel[None, :]
            sums += tl.load(chunk_sum_ptr + places, mask=mask, other=0.0)
            products += tl.load(chunk_product_ptr + places, mask=mask, other=0.0)
        tl.store(sum_ptr + split * channels + channel, tl.sum(sums, axis=0), mask=valid)
        tl.store(product_ptr + split * channels + channel, tl.sum(products, axis=0), mask=valid)

        if is_last(counter_ptr + splits * tl.num_programs(1) + tl.program_id(1), splits):
            group = tl.arange(0, SPLITS)
            mask = (group[:, None] < splits) & valid[None, :]
            places = group[:, None] * channels + channel[None, :]
            bias_grad = tl.sum(tl.load(sum_ptr + places, mask=mask, other=0.0), axis=0)
            weight_grad = tl.sum(tl.load(product_ptr + places, mask=mask, other=0.0), axis=0)
            tl.store(bias_grad_ptr + channel, bias_grad, mask=valid)
            tl.store(weight_grad_ptr + channel, weight_grad, mask=valid)
