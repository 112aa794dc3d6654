"""The contrastive loss as a fused kernel: the N×K logits never reach memory, and the queue is read once a step.

N queries · C embedding · K queue · P parts of the queue, processed in parallel
"""

# Compile-time constants are in capitals, as is usual in Triton, and are passed as plain values; launch options such as
# enable_fp_fusion are not parameters of a kernel.
# ruff: noqa: N803
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _part_kernel(
    q_ptr,
    queue_ptr,
    reference_ptr,
    total_ptr,
    mean_ptr,
    n,
    k,
    part_size,
    scale,
    EXACT: tl.constexpr,
    RAGGED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Softmax of a block of queries over one part of the queue: its sum, and the mean of the keys weighted with it.

    With x = scale · q · keysᵀ, base-2 logits:

        total = Σ_j 2^(x_j − reference),  mean = Σ_j 2^(x_j − reference) · key_j / total

    This is attention with the queue as both keys and values (Milakov and Gimelshein 2018; Dao et al. 2022). The
    weighted mean of keys is all the gradient needs, so the backward pass does not recompute logits.
    """
    parts = tl.num_programs(1)
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)
    inside = (row[:, None] < n) & (column[None, :] < CHANNELS)
    q = tl.load(q_ptr + row[:, None].to(tl.int64) * CHANNELS + column[None, :], mask=inside, other=0.0)
    q = q.to(tl.float32 if EXACT else tl.float16)
    # Weights up to 2^15, the largest power of 2 in float16, use its range: 40 powers of 2 instead of 25.
    headroom = 0.0 if EXACT else 15.0

    reference = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    start = part * part_size
    for block in range(start, tl.minimum(start + part_size, k), BLOCK_K):
        key = block + tl.arange(0, BLOCK_K)
        if RAGGED:  # the last key instead of keys after the end, whose weight will be 0
            key = tl.minimum(key, k - 1)
        pointers = queue_ptr + key[:, None].to(tl.int64) * CHANNELS + column[None, :]
        if BLOCK_C == CHANNELS:
            keys = tl.load(pointers).to(q.dtype)
        else:
            keys = tl.load(pointers, mask=column[None, :] < CHANNELS, other=0.0).to(q.dtype)
        products = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if RAGGED:  # noqa: SIM102 (this one is decided when the kernel is compiled)
            if block + BLOCK_K > k:
                products = tl.where(block + tl.arange(0, BLOCK_K)[None, :] < k, products, float("-inf"))
        new_reference = tl.maximum(reference, tl.max(products, axis=1) * scale - headroom)
        rescale = tl.exp2(reference - new_reference)
        weights = tl.exp2(products * scale - new_reference[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        mean = tl.dot(weights.to(q.dtype), keys, mean * rescale[:, None], input_precision="ieee")
        reference = new_reference

    offset = row.to(tl.int64) * parts + part
    tl.store(reference_ptr + offset, reference, mask=row < n)
    tl.store(total_ptr + offset, total, mask=row < n)
    mean = (mean * (1.0 / total)[:, None]).to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + offset[:, None] * CHANNELS + column[None, :], mean, mask=inside)


@triton.jit
def _finish_kernel(
    q_ptr,
    k_ptr,
    reference_ptr,
    total_ptr,
    mean_ptr,
    loss_ptr,
    grad_ptr,
    parts,
    inverse_temperature,
    inverse_n,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Loss of one query, from all parts and its positive, and its gradient of the mean loss."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    reference = tl.full((), float("-inf"), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        references = tl.load(reference_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
        reference = tl.maximum(reference, tl.max(references, axis=0))
    totals = tl.zeros((BLOCK_P,), tl.float32)
    means = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        references = tl.load(reference_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
        weights = tl.load(total_ptr + row * parts + part, mask=part < parts, other=0.0)
        weights *= tl.exp2(references - reference)
        mean = tl.load(
            mean_ptr + (row * parts + part[:, None]) * CHANNELS + column[None, :],
            mask=(part[:, None] < parts) & (column[None, :] < CHANNELS),
            other=0.0,
        )
        totals += weights
        means += weights[:, None] * mean.to(tl.float32)
    total = tl.sum(totals, axis=0)
    negative = tl.fdiv(tl.sum(means, axis=0), total)

    q = tl.load(q_ptr + row * CHANNELS + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row * CHANNELS + column, mask=column < CHANNELS, other=0.0).to(tl.float32)
    gap = (reference + tl.log2(total)) * _LN_2 - tl.sum(q * k, axis=0) * inverse_temperature

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
    tl.store(grad_ptr + row * CHANNELS + column, grad, mask=column < CHANNELS)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """`fastmoco.step.info_nce.info_nce` without stored logits; the gradient flows into q only.

    q, k (N, C), queue (K, C), each float32, bfloat16 or float16, all of unit norm → 0-d float32.

    **Precision.** The positive is computed in float32. For the negatives, elements of q and of the queue are rounded to
    float16 in registers, whatever their type, and multiplied on tensor cores with float32 sums. Elements of unit
    vectors are at most 1: float16 keeps 11 bits of them, as TF32 does at twice the size and half the rate (bfloat16:
    8), and at least 2^-25 in absolute terms. So a logit, and with it the loss, is off by at most

        (2 · 2^-11 + 2^-22) · Σ_c |q_c · key_c| / τ ≤ 2^-10 / τ

    and the gradient of a query by 2^-10 / τ more, since weights and partial means are rounded too. Errors of many keys
    average out: with N = 256, K = 65,536, C = 128, τ = 0.07 and this rounding emulated in float64, the loss is off by
    1e-6 and the gradient by 5e-5 of its norm (4e-6 and 4e-4 with bfloat16).

    Products are those of float32 if q is, `torch.backends.cudnn.allow_tf32` is False, and
    `torch.get_float32_matmul_precision()` is "highest". The first is True and the last "highest" unless changed: a
    float32 step of torch rounds its convolutions to 11 bits, and exact products of what they compute would be exact
    about noise. GPUs before compute capability 8.0, on which Triton has no tensor cores, always multiply in float32.

    **Cost.** 4·N·K·C floating-point operations, one pass over the queue in memory, and N·P·C·2 bytes of partial means,
    written and read. On an H200, N = 256, K = 65,536, C = 128: 8.6 GFLOP, 11 µs; 33.6 MB, 8 µs; P = 64, 4.2 MB each
    way, which stay in the L2 cache. The exact products take 0.15 ms at best. N = 512, K = 4,096, C = 128: 1.1 GFLOP,
    2.1 MB, P = 32, 4.2 MB: all less than a launch. In eager torch the logits alone are 67 and 8.4 MB, written once and
    read three times.
    """
    assert q.shape == k.shape, (q.shape, k.shape)
    assert q.shape[1:] == queue.shape[1:], (q.shape, queue.shape)
    for tensor in (q, k, queue):
        assert tensor.dtype in (torch.float32, torch.bfloat16, torch.float16), tensor.dtype
    assert not k.requires_grad
    assert not queue.requires_grad
    loss, _ = _info_nce(q, k, queue, temperature)
    return loss


@torch.library.custom_op("fastmoco::info_nce", mutates_args=())
def _info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The 0-d mean loss, and its (N, C) gradient, float32; an operator that `torch.compile` does not look into."""
    q, k, queue = q.contiguous(), k.contiguous(), queue.contiguous()
    (n, channels), size = q.shape, len(queue)
    plan = _plan(n, channels, q.device, exact=_exact(q))
    row_blocks, key_blocks = triton.cdiv(n, plan.rows), triton.cdiv(size, plan.keys)
    part_size = triton.cdiv(key_blocks, max(1, plan.programs // row_blocks)) * plan.keys
    parts = triton.cdiv(size, part_size)
    block_c = max(16, triton.next_power_of_2(channels))

    reference, total = torch.empty((2, n, parts), dtype=torch.float32, device=q.device)
    mean = torch.empty((n, parts, channels), dtype=torch.float32 if plan.exact else torch.float16, device=q.device)
    _part_kernel[(row_blocks, parts)](
        q,
        queue,
        reference,
        total,
        mean,
        n,
        size,
        part_size,
        math.log2(math.e) / temperature,
        EXACT=plan.exact,
        RAGGED=size % plan.keys != 0,
        CHANNELS=channels,
        BLOCK_N=plan.rows,
        BLOCK_K=plan.keys,
        BLOCK_C=block_c,
        num_warps=plan.warps,
        num_stages=plan.stages,
        enable_fp_fusion=True,
    )
    losses = torch.empty(n, dtype=torch.float32, device=q.device)
    q_grad = torch.empty((n, channels), dtype=torch.float32, device=q.device)
    _finish_kernel[(n,)](
        q,
        k,
        reference,
        total,
        mean,
        losses,
        q_grad,
        parts,
        1.0 / temperature,
        1.0 / n,
        CHANNELS=channels,
        BLOCK_P=max(2, 2**12 // block_c),
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return losses.mean(), q_grad


@_info_nce.register_fake
def _(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return q.new_empty((), dtype=torch.float32), torch.empty(q.shape, dtype=torch.float32, device=q.device)


def _keep_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    q_grad = output[1]
    ctx.mark_non_differentiable(q_grad)
    ctx.set_materialize_grads(False)  # no zeros for the gradient of q_grad, which would be a launch
    ctx.save_for_backward(q_grad)
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
    (q_grad,) = ctx.saved_tensors
    return (None if grad is None else (q_grad * grad).to(ctx.dtype)), None, None, None


_info_nce.register_autograd(_backward, setup_context=_keep_gradient)


def _exact(q: Tensor) -> bool:
    cudnn: Any = torch.backends.cudnn
    settings = cudnn.conv, torch.backends.cuda.matmul
    return q.dtype == torch.float32 and all(setting.fp32_precision != "tf32" for setting in settings)


class _Plan(NamedTuple):
    """How the work is divided.

    exact     float32 products instead of float16 ones
    rows      queries of a program
    keys      keys of a block
    programs  that fill the device once: more parts of the queue would only write more partial means
    """

    exact: bool
    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


def _plan(n: int, channels: int, device: torch.device, *, exact: bool) -> _Plan:
    on_gpu = device.type == "cuda"
    capability: Any = torch.cuda.get_device_capability(device) if on_gpu else (9, 0)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 2
    block_c = max(16, triton.next_power_of_2(channels))
    fewest = max(16, triton.next_power_of_2(n))
    if exact or capability < (8, 0):
        most_rows = 32 if capability >= (8, 0) else 64  # the other way round, ptxas spills registers
        rows = max(16, min(most_rows, fewest, 2**13 // block_c))
        return _Plan(True, rows, max(16, min(64, 2**12 // block_c)), 8, 3, 2 * processors)
    # Elements of a block of queries, and of one of keys. Each block of queries reads the queue from the L2 cache, which
    # large ones spare. On sm_90 and sm_100 tensor cores read the keys from shared memory; elsewhere operands pass
    # through registers, which are the limit then.
    elements, most_rows, most_keys = (2**14, 128, 128) if capability[0] in (9, 10) else (2**13, 64, 64)
    rows = max(16, min(most_rows, fewest, elements // block_c))
    warps = 4 if rows <= 64 and rows * block_c <= 2**13 else 8
    keys = max(16, min(most_keys, elements // block_c))
    return _Plan(False, rows, keys, warps, 2, (8 // warps) * processors)
