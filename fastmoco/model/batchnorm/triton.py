"""Training batch norm over groups of a batch, with the residual sum and ReLU that follow it, on channels-last memory.

N samples · C channels · H, W sides · s splits · R = N/s · H · W rows of a split
"""

# Compile-time constants are passed as plain values; launch options such as enable_fp_fusion are not parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco.model.batchnorm.triton_kernels import (
    gradient_sums_kernel,
    input_gradient_kernel,
    normalise_kernel,
)
from fastmoco.model.batchnorm.triton_plan import dense, plan_of, split_statistics
from fastmoco.model.operator import Operator


def split_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    splits: int,
    momentum: float,
    eps: float,
    relu: bool = False,
    residual: Tensor | None = None,
    twice: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The training forward of `batchnorm.split.SplitBatchNorm2d`, then `+ residual` and ReLU if requested:

        y = relu(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    x, residual (N, C, H, W) float32, bfloat16 or float16, channels-last (anything else is copied first); N a multiple
    of splits. weight, bias, running_mean, running_var (C,) float32; the last two are updated in place, by means over
    the splits, with the unbiased variance. Returns y in x's type, channels-last, differentiable in x, weight, bias and
    residual. With `twice` it returns y two times, for two uses of it: their gradients are added inside the backward
    kernel, which saves the pass of autograd's addition. All sums and statistics are float32.

    Bound by memory. Forward: x is read twice, y written once, and a residual read once: 3 (4) passes. Backward: x and
    dy twice, dx once: 5; with residual and ReLU 7. In bfloat16 at 4.3 TB/s that is, forward and backward,

        CIFAR ResNet-18, B = 512, 64×32×32    67 MB a pass    0.047 + 0.078 ms    (with residual 0.062 + 0.11)
        ResNet-50, B = 256, 64×112×112       411 MB a pass    0.29 + 0.48 ms
        ResNet-50, B = 256, 256×56×56        411 MB a pass    (with residual 0.38 + 0.67)

    or less, if a layer fits the L2 cache and is read from there the second time. Two launches in each direction.
    """
    assert x.dim() == 4, x.shape
    assert len(x) % splits == 0, (x.shape, splits)
    assert x.numel() // (x.shape[1] * splits) > 1, "one value per channel has no variance"
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (weight, bias, running_mean, running_var))
    x = dense(x)
    mean, scale = split_statistics(x.detach(), running_mean, running_var, splits, momentum, eps)
    residual = None if residual is None else dense(residual)
    return normalise(x, weight, bias, mean, scale, relu, residual, twice)


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, relu: bool, residual: Tensor | None
) -> Tensor:
    plan = plan_of(x, len(mean))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    normalise_kernel[plan.grid](
        x,
        x if residual is None else residual,
        y,
        mean,
        scale,
        weight,
        bias,
        plan.rows,
        plan.channels,
        plan.chunk_rows,
        RELU=relu,
        RESIDUAL=residual is not None,
        **plan.blocks,
    )
    return y


def _apply_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    y: Tensor | None,
    grad: Tensor,
    second: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    splits, plan = len(mean), plan_of(x, len(mean))
    size = plan.rows, plan.channels, plan.chunk_rows
    masked, twice = y is not None, second is not None
    chunk_sum, chunk_product = x.new_empty((2, splits * plan.chunks, plan.channels), dtype=torch.float32)
    total, product = x.new_empty((2, splits, plan.channels), dtype=torch.float32)
    x_grad, weight_grad, bias_grad, before_relu = _backward_fake(x, weight, bias, mean, scale, y, grad, second)
    stored = masked or twice
    gradient_sums_kernel[plan.grid](
        x,
        y if masked else x,
        grad,
        second if twice else grad,
        before_relu if stored else grad,
        mean,
        scale,
        weight,
        bias,
        chunk_sum,
        chunk_product,
        total,
        product,
        weight_grad,
        bias_grad,
        plan.counters(x.device),
        *size,
        splits,
        RELU=relu,
        RESIDUAL=masked,
        TWICE=twice,
        **plan.sum_blocks,
    )
    input_gradient_kernel[plan.grid](
        x,
        before_relu if stored else grad,
        x_grad,
        mean,
        scale,
        weight,
        bias,
        total,
        product,
        *size,
        RELU=relu and not stored,
        **plan.blocks,
    )
    return x_grad, weight_grad, bias_grad, before_relu


def _backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    y: Tensor | None,
    grad: Tensor,
    second: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stored = y is not None or second is not None
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.empty_like(weight),
        torch.empty_like(bias),
        torch.empty_like(grad, memory_format=torch.channels_last) if stored else grad.new_empty(0),
    )


batch_norm_apply = Operator(
    "batch_norm_apply",
    "(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor scale, bool relu, Tensor? residual) -> Tensor",
    _apply,
    _apply_fake,
)
"""relu(weight · (x − mean) · scale + bias + residual) of splits with the given (s, C) statistics, which are those of x:
its gradient in x contains theirs."""

batch_norm_backward = Operator(
    "batch_norm_backward",
    "(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor scale, Tensor? y, Tensor grad, Tensor? second, "
    "bool relu) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
"""Gradients in x, weight and bias, and before the ReLU: that of the residual.

y is given if the sign before the ReLU does not follow from x. The fourth is empty where it would be `grad` itself:
without y and second.
"""


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, mean, scale, relu, residual, *_ = inputs
    y = output[0] if isinstance(output, tuple) else output
    ctx.save_for_backward(x, weight, bias, mean, scale, y if relu and residual is not None else None)
    ctx.relu, ctx.with_residual = relu, residual is not None


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the arguments of `batch_norm_apply`."""
    *saved, y = ctx.saved_tensors
    given = [dense(grad) for grad in grads if grad is not None]
    if not given:
        return (None,) * 7
    grad, second = given[0], given[1] if len(given) == 2 else None
    x_grad, weight_grad, bias_grad, before_relu = batch_norm_backward(*saved, y, grad, second, ctx.relu)
    stored = y is not None or second is not None
    residual_grad = (before_relu if stored else grad) if ctx.with_residual else None
    return x_grad, weight_grad, bias_grad, None, None, None, residual_grad


batch_norm_apply.definition.register_autograd(_gradients, setup_context=_save)


class _SplitBatchNorm(torch.autograd.Function):
    """`batch_norm_apply` whose output can be had two times: the results of an operator may not share their memory."""

    @staticmethod
    def forward(*args: Any) -> Tensor | tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, twice = args
        y = batch_norm_apply(*inputs)
        return (y, y.view_as(y)) if twice else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_gradients(ctx, *grads), None


@torch.compiler.allow_in_graph  # the compiler's own way through such a function makes zeros of missing gradients
def normalise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    relu: bool,
    residual: Tensor | None,
    twice: bool,
) -> Any:
    """The second half of `split_batch_norm`: `batch_norm_apply`, differentiable, of channels-last x and residual."""
    return _SplitBatchNorm.apply(x, weight, bias, mean, scale, relu, residual, twice)
