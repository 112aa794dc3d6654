"""Launches of the kernels behind the operators of `fastmoco.model.pointwise.op`. All activations are channels-last.

N samples · I input channels · O output channels · H, W sides · s splits
"""

# Compile-time constants are passed as plain values; launch options such as enable_fp_fusion are not parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastmoco.model.batchnorm.triton_kernels import input_gradient_kernel
from fastmoco.model.batchnorm.triton_plan import plan_of
from fastmoco.model.pointwise.gradient_kernels import (
    join_parts_kernel,
    matrix_gradient_kernel,
    product_gradient_kernel,
)
from fastmoco.model.pointwise.kernels import product_kernel
from fastmoco.model.pointwise.plan import plan_matrix, plan_product, precision_of

_JOIN_BLOCK = 1024


def empty(x: Tensor) -> Tensor:
    """What stands for a tensor that there is not."""
    return x.new_empty(0, dtype=torch.float32)


def room(x: Tensor, channels: int) -> Tensor:
    """Memory for as many pixels as x has, with other channels."""
    shape = len(x), channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def multiply(
    x: Tensor,
    before_mean: Tensor,
    before_scale: Tensor,
    before_gamma: Tensor,
    before_beta: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    splits: int,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Product, its mean and scale, and the activated x, which is stored if it has a residual."""
    activated = before_gamma.numel() > 0
    plan = plan_product(x, len(weight), splits, activated=activated, residual=residual is not None)
    y, applied = room(x, len(weight)), empty(x) if residual is None else torch.empty_like(x)
    mean = x.new_empty((splits, plan.channels), dtype=torch.float32)
    scale = torch.empty_like(mean)
    product_kernel[plan.grid](
        x,
        x if residual is None else residual,
        x if residual is None else applied,
        weight.contiguous(),
        y,
        before_mean,
        before_scale,
        before_gamma,
        before_beta,
        *plan.tile_sums(x),
        *plan.chunk_sums(x),
        mean,
        scale,
        running_mean,
        running_var,
        plan.counters(x.device),
        *plan.sizes,
        momentum,
        eps,
        ACTIVATE=activated,
        RESIDUAL=residual is not None,
        **precision_of(x),
        **plan.constants,
    )
    return y, mean, scale, applied


def input_gradient(
    y_grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    applied: Tensor | None,
    splits: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma and beta of the batch norm before the convolution, and of the sum before its ReLU.

    second   gradient of the activated x from elsewhere
    applied  the activated x, if it has a residual
    """
    plan = plan_product(y_grad, x.shape[1], splits)
    before_relu, gamma_grad, beta_grad = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(beta)
    total, product = x.new_empty((2, splits, plan.channels), dtype=torch.float32)
    product_gradient_kernel[plan.grid](
        y_grad,
        weight.contiguous(),
        x,
        x if applied is None else applied,
        x if second is None else second,
        before_relu,
        mean,
        scale,
        gamma,
        beta,
        *plan.tile_sums(x),
        *plan.chunk_sums(x),
        total,
        product,
        gamma_grad,
        beta_grad,
        plan.counters(x.device),
        *plan.sizes,
        RESIDUAL=applied is not None,
        TWICE=second is not None,
        **precision_of(x),
        **plan.constants,
    )
    norm_plan, x_grad = plan_of(x, splits), torch.empty_like(x)
    input_gradient_kernel[norm_plan.grid](
        x,
        before_relu,
        x_grad,
        mean,
        scale,
        gamma,
        beta,
        total,
        product,
        norm_plan.rows,
        norm_plan.channels,
        norm_plan.chunk_rows,
        RELU=False,
        **norm_plan.blocks,
    )
    return x_grad, gamma_grad, beta_grad, before_relu


def matrix_gradient(
    y_grad: Tensor,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    splits: int,
) -> Tensor:
    """The gradient of the weight, from the activated x, which is computed again."""
    plan = plan_matrix(x, len(weight), splits)
    parts = x.new_empty((plan.chunks, plan.outer, plan.channels), dtype=torch.float32)
    matrix_gradient_kernel[plan.grid](
        y_grad, x, parts, mean, scale, gamma, beta, *plan.sizes, **precision_of(x), **plan.constants
    )
    weight_grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    size = weight.numel()
    join_parts_kernel[(triton.cdiv(size, _JOIN_BLOCK),)](
        parts, weight_grad, size, plan.chunks, BLOCK=_JOIN_BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return weight_grad


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_input_grad: bool, needs_weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """torch's gradients of x and weight; those not needed are empty."""
    needed = [needs_input_grad, needs_weight_grad, False]
    found = torch.ops.aten.convolution_backward(grad, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, needed)
    x_grad, weight_grad = (empty(x) if tensor is None else tensor for tensor in found[:2])
    return x_grad, weight_grad
