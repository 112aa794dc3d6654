"""Training batch norm over groups of a batch, with the residual sum and ReLU that follow it, on channels-last memory.

N samples · C channels · H, W sides · s splits · R = N/s · H · W rows of a split
"""

# Compile-time constants are passed as plain values; launch options such as enable_fp_fusion are not parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco.model.batchnorm.triton_kernels import (
    gradient_sums_kernel,
    input_gradient_kernel,
    join_gradients_kernel,
    join_statistics_kernel,
    normalise_kernel,
    statistics_kernel,
)

_TILE = 4096  # elements of a tile: 32 for each thread of four warps, 8 KiB in flight per program in 16 bits
_JOINED = 8  # channels per program of the join kernels: 32 bytes, the smallest memory transaction


class _Plan(NamedTuple):
    """The tiling of the matrix (see `triton_kernels`)."""

    rows: int  # of a split
    channels: int
    splits: int
    chunks: int  # of a split
    chunk_rows: int
    block_rows: int
    block_channels: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.chunks, triton.cdiv(self.channels, self.block_channels), self.splits

    @property
    def join_grid(self) -> tuple[int]:
        return (triton.cdiv(self.channels, _JOINED),)

    @property
    def join_blocks(self) -> dict[str, int]:
        return {
            "SPLITS": triton.next_power_of_2(self.splits),
            "CHUNKS": triton.next_power_of_2(self.chunks),
            "BLOCK_C": _JOINED,
            "num_warps": 4 if self.splits * self.chunks <= 512 else 8,
            "enable_fp_fusion": True,
        }

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_R": self.block_rows, "BLOCK_C": self.block_channels, "num_warps": 4, "enable_fp_fusion": True}


def _plan(x: Tensor, splits: int) -> _Plan:
    samples, channels, height, width = x.shape
    rows = samples // splits * height * width
    block_channels = min(128, triton.next_power_of_2(channels))
    block_rows = min(_TILE // block_channels, triton.next_power_of_2(rows))
    programs = triton.cdiv(channels, block_channels) * splits
    # As many programs as are resident at once, each with a long run of rows; at most 512 partial sums per channel.
    chunks = max(1, min(triton.cdiv(_programs(x.device), programs), 512 // splits))
    chunk_rows = triton.cdiv(triton.cdiv(rows, chunks), block_rows) * block_rows
    return _Plan(rows, channels, splits, triton.cdiv(rows, chunk_rows), chunk_rows, block_rows, block_channels)


def _programs(device: torch.device) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


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
) -> Tensor:
    """The training forward of `batchnorm.split.SplitBatchNorm2d`, then `+ residual` and ReLU if requested:

        y = relu(weight · (x − mean) / sqrt(var + eps) + bias + residual)

    x, residual (N, C, H, W) float32, bfloat16 or float16, channels-last (anything else is copied first); N a multiple
    of splits. weight, bias, running_mean, running_var (C,) float32; the last two are updated in place, by means over
    the splits, with the unbiased variance. Returns y in x's type, channels-last, differentiable in x, weight, bias and
    residual. All sums and statistics are float32.

    Bound by memory. Forward: x is read twice, y written once, and a residual read once: 3 (4) passes. Backward: x and
    dy twice, dx once: 5; with residual and ReLU 7. In bfloat16 at 4.3 TB/s that is, forward and backward,

        CIFAR ResNet-18, B = 512, 64×32×32    67 MB a pass    0.047 + 0.078 ms    (with residual 0.062 + 0.11)
        ResNet-50, B = 256, 64×112×112       411 MB a pass    0.29 + 0.48 ms
        ResNet-50, B = 256, 256×56×56        411 MB a pass    (with residual 0.38 + 0.67)

    or less, if a layer fits the L2 cache and is read from there the second time. Three launches in each direction.
    """
    assert x.dim() == 4, x.shape
    assert len(x) % splits == 0, (x.shape, splits)
    assert x.numel() // (x.shape[1] * splits) > 1, "one value per channel has no variance"
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (weight, bias, running_mean, running_var))
    return _SplitBatchNorm.apply(x, weight, bias, running_mean, running_var, splits, momentum, eps, relu, residual)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _SplitBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        splits: int,
        momentum: float,
        eps: float,
        relu: bool,
        residual: Tensor | None,
    ) -> Tensor:
        x = _dense(x)
        plan = _plan(x, splits)
        size = plan.rows, plan.channels, plan.chunk_rows
        chunk_mean, chunk_square = x.new_empty((2, splits * plan.chunks, plan.channels), dtype=torch.float32)
        mean, scale = x.new_empty((2, splits, plan.channels), dtype=torch.float32)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        statistics_kernel[plan.grid](x, chunk_mean, chunk_square, *size, **plan.blocks)
        join_statistics_kernel[plan.join_grid](
            chunk_mean,
            chunk_square,
            mean,
            scale,
            running_mean,
            running_var,
            splits,
            plan.chunks,
            *size,
            momentum,
            eps,
            **plan.join_blocks,
        )
        with_residual = residual is not None
        normalise_kernel[plan.grid](
            x,
            _dense(residual) if with_residual else x,
            y,
            mean,
            scale,
            weight,
            bias,
            *size,
            RELU=relu,
            RESIDUAL=with_residual,
            **plan.blocks,
        )
        # y is needed only if the sign of z does not follow from x
        ctx.save_for_backward(x, weight, bias, mean, scale, *([y] if relu and with_residual else []))
        ctx.splits, ctx.relu, ctx.with_residual = splits, relu, with_residual
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, mean, scale, *rest = ctx.saved_tensors
        grad = _dense(grads[0])
        masked = bool(rest)
        plan = _plan(x, ctx.splits)
        size = plan.rows, plan.channels, plan.chunk_rows
        chunk_sum, chunk_product = x.new_empty((2, ctx.splits * plan.chunks, plan.channels), dtype=torch.float32)
        total, product = x.new_empty((2, ctx.splits, plan.channels), dtype=torch.float32)
        weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(bias)
        before_relu = torch.empty_like(grad) if masked else grad
        gradient_sums_kernel[plan.grid](
            x,
            rest[0] if masked else x,
            grad,
            before_relu,
            mean,
            scale,
            weight,
            bias,
            chunk_sum,
            chunk_product,
            *size,
            RELU=ctx.relu,
            RESIDUAL=masked,
            **plan.blocks,
        )
        join_gradients_kernel[plan.join_grid](
            chunk_sum,
            chunk_product,
            total,
            product,
            weight_grad,
            bias_grad,
            ctx.splits,
            plan.chunks,
            plan.channels,
            **plan.join_blocks,
        )
        x_grad = torch.empty_like(x, memory_format=torch.channels_last)
        input_gradient_kernel[plan.grid](
            x,
            before_relu,
            x_grad,
            mean,
            scale,
            weight,
            bias,
            total,
            product,
            *size,
            RELU=ctx.relu and not masked,
            **plan.blocks,
        )
        residual_grad = before_relu if ctx.with_residual else None
        return x_grad, weight_grad, bias_grad, None, None, None, None, None, None, residual_grad
