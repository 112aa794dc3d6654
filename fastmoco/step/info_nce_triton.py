"""The contrastive loss as a fused kernel: the N×K logits never reach memory, and the queue is read once a step.

N queries · C embedding · K queue · P parts of the queue, processed in parallel
"""

# Compile-time constants are in capitals, as is usual in Triton, and are passed as plain values; launch options such as
# enable_fp_fusion are not parameters of a kernel.
# ruff: noqa: N803
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _product(a, b, accumulator, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b + accumulator; converted for Triton's interpreter, which multiplies the bit patterns of bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _part_kernel(
    q_ptr,
    queue_ptr,
    largest_ptr,
    sum_ptr,
    mean_ptr,
    n,
    k,
    channels,
    part_size,
    inverse_temperature,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Log-sum-exp (base 2) and softmax-weighted mean of the keys, for a block of queries and one part of the queue.

    This is attention with the queue as both keys and values (Milakov and Gimelshein 2018; Dao et al. 2022). The
    weighted mean of keys is all the gradient needs, so the backward pass does not recompute logits.
    """
    parts = tl.num_programs(1)
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)
    inside = (row[:, None] < n) & (column[None, :] < channels)
    q = tl.load(q_ptr + row[:, None].to(tl.int64) * channels + column[None, :], mask=inside, other=0.0)

    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    first = part * part_size
    for start in range(first, tl.minimum(first + part_size, k), BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        # Never all False, since a part begins inside the queue: the maximum below is finite.
        valid = key < k
        keys = tl.load(
            queue_ptr + key[:, None].to(tl.int64) * channels + column[None, :],
            mask=valid[:, None] & (column[None, :] < channels),
            other=0.0,
        )
        zeros = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        logits = _product(q, tl.trans(keys), zeros, PRECISION, WIDEN) * (inverse_temperature * _LOG2_E)
        logits = tl.where(valid[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        rescale = tl.exp2(largest - new_largest)
        weights = tl.exp2(logits - new_largest[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        mean = _product(weights.to(keys.dtype), keys, mean * rescale[:, None], PRECISION, WIDEN)
        largest = new_largest

    offset = row.to(tl.int64) * parts + part
    tl.store(largest_ptr + offset, largest, mask=row < n)
    tl.store(sum_ptr + offset, total, mask=row < n)
    tl.store(mean_ptr + offset[:, None] * channels + column[None, :], mean, mask=inside)


@triton.jit
def _finish_kernel(
    q_ptr,
    k_ptr,
    largest_ptr,
    sum_ptr,
    mean_ptr,
    loss_ptr,
    grad_ptr,
    parts,
    channels,
    inverse_temperature,
    inverse_n,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Loss of one query, from all parts and its positive, and its gradient of the mean loss."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    column = tl.arange(0, BLOCK_C)
    largest = tl.load(largest_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    maximum = tl.max(largest, axis=0)
    rescale = tl.exp2(largest - maximum)
    total = tl.sum(rescale * tl.load(sum_ptr + row * parts + part, mask=part < parts, other=0.0), axis=0)
    means = tl.load(
        mean_ptr + (row * parts + part[:, None]) * channels + column[None, :],
        mask=(part[:, None] < parts) & (column[None, :] < channels),
        other=0.0,
    )
    negative = tl.fdiv(tl.sum(rescale[:, None] * means, axis=0), total)

    q = tl.load(q_ptr + row * channels + column, mask=column < channels, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row * channels + column, mask=column < channels, other=0.0).to(tl.float32)
    gap = (maximum + tl.log2(total)) * _LN_2 - tl.sum(q * k, axis=0) * inverse_temperature

    # softplus(gap) = max(gap, 0) + log1p(u). Kahan's correction makes log1p accurate for small u.
    u = tl.exp(-tl.abs(gap))
    one_plus_u = 1.0 + u
    rounded_u = one_plus_u - 1.0
    lost = rounded_u == 0.0
    log1p = tl.where(lost, u, tl.log(one_plus_u) * tl.fdiv(u, tl.where(lost, 1.0, rounded_u)))
    tl.store(loss_ptr + row, tl.maximum(gap, 0.0) + log1p)

    # d loss / d q = sigmoid(gap) · (weighted mean of the queue − k) / temperature
    sigmoid = tl.fdiv(tl.where(gap >= 0, 1.0, u), one_plus_u)
    grad = (negative - k) * (sigmoid * inverse_temperature * inverse_n)
    tl.store(grad_ptr + row * channels + column, grad, mask=column < channels)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """`fastmoco.step.info_nce.info_nce` without stored logits; the gradient flows into q only.

    q, k (N, C), queue (K, C), float32 or bfloat16 or float16, all of unit norm → 0-d float32.

    Products are summed in float32. If q and the queue both have 16 bits, the tensor cores multiply them directly;
    otherwise both are converted to float32 and multiplied with `torch.get_float32_matmul_precision`.

    4·N·K·C floating-point operations and one pass over the queue: N = 256, K = 65,536, C = 128 are 8.6 GFLOP and
    33.6 MB in float32, so 8 µs of memory traffic and 11 µs of bf16 (22 µs of tf32, 0.15 ms of exact float32)
    arithmetic at H200 rates. In eager torch, the logits alone are 67 MB, written once and read three times. With
    N = 512, K = 4,096, C = 128, as for CIFAR, both take less than a launch.
    """
    assert q.shape == k.shape, (q.shape, k.shape)
    assert q.shape[1:] == queue.shape[1:], (q.shape, queue.shape)
    assert q.dtype in (torch.float32, torch.bfloat16, torch.float16), q.dtype
    assert not k.requires_grad
    assert not queue.requires_grad
    return _InfoNCE.apply(q, k, queue, temperature)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
        if q.dtype != queue.dtype:
            q_like, queue = q.float(), queue.float()
        else:
            q_like = q
        losses, q_grad = _losses_and_gradient(q_like.contiguous(), k.contiguous(), queue.contiguous(), temperature)
        ctx.save_for_backward(q_grad)
        ctx.dtype = q.dtype  # pyright: ignore[reportAttributeAccessIssue]
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (q_grad,) = ctx.saved_tensors
        return (q_grad * grads[0]).to(ctx.dtype), None, None, None


def _losses_and_gradient(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(N,) losses, and (N, C) the gradient of their mean, float32."""
    (n, channels), size = q.shape, len(queue)
    wide = queue.element_size() == 4
    exact = wide and torch.get_float32_matmul_precision() == "highest"
    block_c = max(16, triton.next_power_of_2(channels))
    block_n = 16 if n <= 16 else 32 if exact else 64
    # Half as many keys for each doubling of their width: a block of keys takes 16 KiB of shared memory per stage.
    block_k = max(16, min(64, 2**13 // block_c // (2 if wide else 1)))
    blocks = triton.cdiv(size, block_k)
    row_blocks = triton.cdiv(n, block_n)
    part_size = triton.cdiv(blocks, max(1, _programs(q.device) // row_blocks)) * block_k
    parts = triton.cdiv(size, part_size)

    largest, total = torch.empty((2, n, parts), dtype=torch.float32, device=q.device)
    mean = torch.empty((n, parts, channels), dtype=torch.float32, device=q.device)
    _part_kernel[(row_blocks, parts)](
        q,
        queue,
        largest,
        total,
        mean,
        n,
        size,
        channels,
        part_size,
        1.0 / temperature,
        PRECISION="ieee" if exact else "tf32",
        WIDEN=not q.is_cuda,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=8 if exact else 4,  # exact products on 4 warps spill registers on sm_75 and sm_90
        num_stages=3,
        enable_fp_fusion=True,
    )
    losses = torch.empty(n, dtype=torch.float32, device=q.device)
    q_grad = torch.empty((n, channels), dtype=torch.float32, device=q.device)
    _finish_kernel[(n,)](
        q,
        k,
        largest,
        total,
        mean,
        losses,
        q_grad,
        parts,
        channels,
        1.0 / temperature,
        1.0 / n,
        BLOCK_P=triton.next_power_of_2(parts),
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return losses, q_grad


def _programs(device: torch.device) -> int:
    """Number of programs that fill the device once: more parts would only write more partial means."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
