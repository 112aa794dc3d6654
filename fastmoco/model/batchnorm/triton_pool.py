"""Training batch norm over groups of a batch, with the ReLU and the max pooling of a ResNet's stem as one operation.

N samples · C channels · H, W sides · P = ⌈H/2⌉, Q = ⌈W/2⌉ sides after pooling · s splits
"""

# Compile-time constants are passed as plain values; launch options such as enable_fp_fusion are not parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco.model.batchnorm.triton_plan import dense, plan_of, split_statistics
from fastmoco.model.batchnorm.triton_pool_kernels import (
    normalise_pool_kernel,
    pool_gradient_sums_kernel,
    pool_input_gradient_kernel,
)
from fastmoco.model.operator import Operator

_TILE = 2048  # elements of a tile: with its taps it takes the registers of twice as many
_WARPS = 8


def split_batch_norm_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    splits: int,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`max_pool2d(relu(batch norm of x), 3, stride=2, padding=1)` of groups of a batch, two times, for two uses of it.

    Arguments and statistics are those of `batchnorm.triton.split_batch_norm`: x (N, C, H, W) → (N, C, P, Q), twice,
    channels-last. The gradient of a window goes to its first largest value, as in torch; to none if that is 0.

    What batch norm writes and pooling reads, and torch's index of 8 bytes per output, do not exist: the index is one
    byte. In bfloat16, with B = 256 images of 64×112×112 (411 MB a pass), forward moves 0.98 GB instead of 2.2, and
    backward 1.5 GB instead of 3.4.
    """
    assert x.dim() == 4, x.shape
    assert len(x) % splits == 0, (x.shape, splits)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (weight, bias, running_mean, running_var))
    x = dense(x)
    mean, scale = split_statistics(x.detach(), running_mean, running_var, splits, momentum, eps)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    y, again, _ = _differentiable(x, weight, bias, mean, scale, differentiable)
    return y, again


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, with_tap: bool
) -> tuple[Tensor, Tensor]:
    channels, height, width = x.shape[1:]
    y, tap = _apply_fake(x, weight, bias, mean, scale, with_tap)
    plan = plan_of(y, len(mean), _TILE)
    normalise_pool_kernel[plan.grid](
        x,
        y,
        tap if with_tap else y,
        mean,
        scale,
        weight,
        bias,
        plan.rows,
        channels,
        plan.chunk_rows,
        height,
        width,
        *y.shape[2:],
        TAP=with_tap,
        **plan.blocks | {"num_warps": _WARPS},
    )
    return y, tap


def _apply_fake(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, with_tap: bool
) -> tuple[Tensor, Tensor]:
    samples, channels, height, width = x.shape
    pooled = samples, channels, (height + 1) // 2, (width + 1) // 2
    y = torch.empty(pooled, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.uint8) if with_tap else x.new_empty(0, dtype=torch.uint8)


def _backward(
    x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, tap: Tensor, grad: Tensor, second: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    splits, twice = len(mean), second is not None
    total_grad = torch.empty_like(grad) if twice else grad
    outputs, plan = plan_of(tap, splits, _TILE), plan_of(x, splits, _TILE)
    sides = *x.shape[2:], *tap.shape[2:]
    chunk_sum, chunk_product = x.new_empty((2, splits * outputs.chunks, plan.channels), dtype=torch.float32)
    total, product = x.new_empty((2, splits, plan.channels), dtype=torch.float32)
    x_grad, weight_grad, bias_grad = _backward_fake(x, weight)
    pool_gradient_sums_kernel[outputs.grid](
        x,
        tap,
        grad,
        second if twice else grad,
        total_grad,
        mean,
        scale,
        chunk_sum,
        chunk_product,
        total,
        product,
        weight_grad,
        bias_grad,
        outputs.counters(x.device),
        outputs.rows,
        plan.channels,
        outputs.chunk_rows,
        splits,
        *sides,
        TWICE=twice,
        **outputs.sum_blocks,
    )
    pool_input_gradient_kernel[plan.grid](
        x,
        tap,
        total_grad,
        x_grad,
        mean,
        scale,
        weight,
        total,
        product,
        plan.rows,
        plan.channels,
        plan.chunk_rows,
        *sides,
        **plan.blocks | {"num_warps": _WARPS},
    )
    return x_grad, weight_grad, bias_grad


def _backward_fake(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    x_grad = torch.empty_like(x, memory_format=torch.channels_last)
    return x_grad, torch.empty_like(weight), torch.empty_like(weight)


batch_norm_pool = Operator(
    "batch_norm_pool",
    "(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor scale, bool with_tap) -> (Tensor, Tensor)",
    _apply,
    _apply_fake,
)
"""Pooled outputs, and if wanted the place of each in its window: with the statistics of x as in `batch_norm_apply`."""

batch_norm_pool_backward = Operator(
    "batch_norm_pool_backward",
    "(Tensor x, Tensor weight, Tensor mean, Tensor scale, Tensor tap, Tensor grad, Tensor? second) -> "
    "(Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
"""Gradients in x, weight and bias."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, mean, scale, _ = inputs
    tap = output[-1]
    ctx.save_for_backward(x, weight, mean, scale, tap)
    ctx.mark_non_differentiable(tap)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the arguments of `batch_norm_pool`; the last output has no gradient."""
    given = [dense(grad) for grad in grads[:-1] if grad is not None]
    if not given:
        return (None,) * 6
    grad, second = given[0], given[1] if len(given) == 2 else None
    return *batch_norm_pool_backward(*ctx.saved_tensors, grad, second), None, None, None


batch_norm_pool.definition.register_autograd(_gradients, setup_context=_save)


class _SplitBatchNormPool(torch.autograd.Function):
    """`batch_norm_pool` with its output two times: the results of an operator may not share their memory."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, tap = batch_norm_pool(*inputs)
        return y, y.view_as(y), tap

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, *grads)


@torch.compiler.allow_in_graph  # the compiler's own way through such a function makes zeros of missing gradients
def _differentiable(*args: Any) -> Any:
    return _SplitBatchNormPool.apply(*args)
