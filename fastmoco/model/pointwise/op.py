"""1×1 convolutions and the training batch norms around them, on channels-last memory.

N samples · I input channels · O output channels · H, W sides · s splits · R = N/s · H · W rows of a split

A batch norm is divided into its two passes: the statistics are summed by what computes its input, and it is applied by
what reads its output. In between there is a `Pending`.
"""

# Compile-time constants are passed as plain values; launch options such as enable_fp_fusion are not parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco.model.batchnorm.triton import normalise
from fastmoco.model.batchnorm.triton_plan import dense, split_statistics
from fastmoco.model.operator import Operator
from fastmoco.model.pointwise import launch


class Norm(NamedTuple):
    """Parameters (C,) and running statistics (C,) of a batch norm, float32; the last two are updated in place."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


class Pending(NamedTuple):
    """A batch norm, residual sum and ReLU that are still to be applied:

        relu(weight · (y − mean) · scale + bias + residual)

    y and residual, if any, (N, C, H, W); mean and scale = 1 / sqrt(var + eps), (s, C) float32, without gradients: what
    applies it has the gradient of y through them as well. weight and bias (C,) float32.
    """

    y: Tensor
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None = None


def normalise_later(x: Tensor, norm: Norm, splits: int, momentum: float, eps: float) -> Pending:
    """relu(batch_norm(x)) to be applied later: one pass over x (N, C, H, W), for its statistics.

    The batch norm is that of `batchnorm.split`, N a multiple of s; the running statistics are updated.
    """
    _check(x, splits)
    with torch.no_grad():
        mean, scale = split_statistics(dense(x), norm.running_mean, norm.running_var, splits, momentum, eps)
    return Pending(x, mean, scale, norm.weight, norm.bias)


def pointwise(
    x: Tensor | Pending, weight: Tensor, norm: Norm, splits: int, momentum: float, eps: float
) -> tuple[Pending, Tensor | None]:
    """relu(batch_norm(conv2d(x, weight), norm)) to be applied later; of a pending x that is applied here.

    x (N, I, H, W) float32, bfloat16 or float16, channels-last (anything else is copied first), weight (O, I, 1, 1) of
    its type. The second result is what x is when applied, for its other uses, if it has a residual; else None.
    Differentiable in x and its parameters, weight, and the parameters of norm. Products are summed in float32; those of
    float32 are TF32 if cuDNN's may be.

    Saved passes over memory, compared with the operations one by one: the statistics are summed where the convolution
    has its result, and x is normalised while it is read. Without a residual it is never written, and in the backward
    computed again; with one it is written and not read again. In the backward, the sums of its batch norm, and with a
    residual that of its two gradients, are made where the convolution's gradient is computed.
    """
    pending = x if isinstance(x, Pending) else Pending(x, *_no_norm(x), *_no_norm(x))
    _check(pending.y, splits)
    assert weight.shape[1:] == (pending.y.shape[1], 1, 1), (weight.shape, pending.y.shape)
    assert weight.dtype == pending.y.dtype, (weight.dtype, pending.y.dtype)
    y, mean, scale, *applied = _Pointwise.apply(
        *pending, weight, norm.running_mean, norm.running_var, splits, momentum, eps
    )
    return Pending(y, mean, scale, norm.weight, norm.bias), applied[0] if applied else None


def finish(pending: Pending, *, twice: bool = False) -> Any:
    """What is pending, (N, C, H, W) channels-last. With `twice`, two times, for two uses whose gradients are then added
    in the backward kernel."""
    y, mean, scale, weight, bias, residual = pending
    residual = None if residual is None else dense(residual)
    return normalise(dense(y), weight, bias, mean, scale, True, residual, twice)


def _check(x: Tensor, splits: int) -> None:
    assert x.dim() == 4, x.shape
    assert len(x) % splits == 0, (x.shape, splits)
    assert x.numel() // (x.shape[1] * splits) > 1, "one value per channel has no variance"


def _no_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """In place of two parameters of a batch norm that there is not."""
    empty = launch.empty(x)
    return empty, empty


class _Pointwise(torch.autograd.Function):
    """The operators below. Not their registered autograd, which cannot leave unused gradients out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        gamma: Tensor,
        beta: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        splits: int,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, ...]:
        y, y_mean, y_scale, applied = _forward(
            x, mean, scale, gamma, beta, residual, weight, running_mean, running_var, splits, momentum, eps
        )
        with_residual = residual is not None
        ctx.save_for_backward(x, mean, scale, gamma, beta, weight, applied if with_residual else None)
        ctx.splits = splits
        ctx.mark_non_differentiable(y_mean, y_scale)
        ctx.set_materialize_grads(False)
        return (y, y_mean, y_scale, applied) if with_residual else (y, y_mean, y_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # once: a checkpoint recomputes them for one reading only
        x, _, _, gamma, _, weight, applied = saved
        grad, second = grads[0], grads[3] if applied is not None else None
        if grad is None:
            grad = x.new_zeros(len(x), len(weight), *x.shape[2:])
        x_grad, gamma_grad, beta_grad, residual_grad, weight_grad = _backward(
            grad, second, *saved, ctx.splits, ctx.needs_input_grad[0]
        )
        normalised = gamma.numel() > 0
        return (
            x_grad if ctx.needs_input_grad[0] else None,
            None,
            None,
            gamma_grad if normalised else None,
            beta_grad if normalised else None,
            residual_grad if applied is not None else None,
            weight_grad,
            *(None,) * 5,
        )


def _multiply(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    gamma: Tensor,
    beta: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    splits: int,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result of the convolution, mean and 1 / sqrt(var + eps) of that, and its input as applied.

    mean, scale, gamma, beta are empty if there is no batch norm before it, and the last result if no residual.
    """
    residual = None if residual is None else dense(residual)
    return launch.multiply(
        dense(x), mean, scale, gamma, beta, residual, weight, running_mean, running_var, splits, momentum, eps
    )


def _multiply_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, _, residual, weight, _, _, splits, _, _ = arguments
    mean = x.new_empty((splits, len(weight)), dtype=torch.float32)
    applied = launch.empty(x) if residual is None else torch.empty_like(x, memory_format=torch.channels_last)
    return launch.room(x, len(weight)), mean, torch.empty_like(mean), applied


_forward = Operator(
    "pointwise",
    "(Tensor x, Tensor mean, Tensor scale, Tensor gamma, Tensor beta, Tensor? residual, Tensor weight, "
    "Tensor(a!) running_mean, Tensor(b!) running_var, int splits, float momentum, float eps) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _multiply,
    _multiply_fake,
    mutates=("running_mean", "running_var"),
)


def _gradients(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    applied: Tensor | None,
    splits: int,
    needs_input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma, beta, the residual and weight; those that there are not are empty.

    grad    of the result of the convolution
    second  of the applied input's other use, if any
    """
    x, grad = dense(x), dense(grad)
    if gamma.numel() == 0:
        x_grad, weight_grad = launch.convolution_backward(grad, x, weight, needs_input_grad, True)
        return x_grad, launch.empty(x), launch.empty(x), launch.empty(x), weight_grad
    norm = mean, scale, gamma, beta
    if applied is None:
        weight_grad = launch.matrix_gradient(grad, x, *norm, weight, splits)
    else:
        weight_grad = launch.convolution_backward(grad, applied, weight, False, True)[1]
    second = None if second is None else dense(second)
    x_grad, gamma_grad, beta_grad, before_relu = launch.input_gradient(grad, second, x, *norm, weight, applied, splits)
    residual_grad = launch.empty(x) if applied is None else before_relu
    return x_grad, gamma_grad, beta_grad, residual_grad, weight_grad


def _gradients_fake(grad: Tensor, second: Tensor | None, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, gamma, beta, weight, applied, _, needs_input_grad = arguments
    normalised = gamma.numel() > 0
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if normalised or needs_input_grad else launch.empty(x),
        torch.empty_like(gamma),
        torch.empty_like(beta),
        launch.empty(x) if applied is None else torch.empty_like(applied),
        torch.empty_like(weight),
    )


_backward = Operator(
    "pointwise_backward",
    "(Tensor grad, Tensor? second, Tensor x, Tensor mean, Tensor scale, Tensor gamma, Tensor beta, Tensor weight, "
    "Tensor? applied, int splits, bool needs_input_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)
