"""Training batch norm over a group of samples that is spread over several ranks.

N samples of a rank · C channels · H, W sides · R ranks of the group · M = R · N · H · W values of a channel
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco.distributed.world import World


def group_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    ranks: World,
) -> Tensor:
    """`F.batch_norm(x of all ranks, …, training=True)[rows of this rank]`, in value and in gradient.

        y = weight · (x − mean) / sqrt(var + eps) + bias                            over all M values, var biased
        dx = weight / sqrt(var + eps) · (dy − Σdy / M − x̂ · Σ(dy · x̂) / M)         sums over all M values too

    x (N, C, H, W) of any floating type and of one shape on all ranks; weight, bias, running_mean, running_var (C,) in
    float32 (float64 with a float64 x), the last two updated in place with the unbiased variance. The gradients of
    weight and bias are those of this rank's loss only, as for every other parameter.

    Two collectives of 2C floats per layer and step: means and variances are gathered and combined by Chan's formula,
    which does not cancel if a mean is far larger than the spread; the two sums of the backward are all-reduced. All
    large passes are torch's native kernels. `nn.SyncBatchNorm` does the same with kernels for CUDA only.

    Raises RankLostError if another rank does not respond.
    """
    return _GroupBatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps, ranks)  # pyright: ignore[reportReturnType]


class _GroupBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        ranks: World,
    ) -> Tensor:
        values = x.numel() // x.shape[1]
        # Running statistics with momentum 1 are those of the batch, in the type of the parameters and not of x.
        local = torch.zeros((1, 2, len(weight)), dtype=weight.dtype, device=x.device)
        torch.batch_norm_update_stats(x, local[0, 0], local[0, 1], 1.0)
        local[0, 1].mul_((values - 1) / values)
        means, variances = ranks.all_gather(local).wait().unbind(dim=1)
        mean = means.mean(dim=0)
        var = variances.mean(dim=0) + (means - mean).square().mean(dim=0)

        total = ranks.size * values
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (total / (total - 1)), momentum)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.total, ctx.eps, ctx.ranks = total, eps, ranks
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        x, weight, mean, var = ctx.saved_tensors
        settings = None, None, False, ctx.eps, [False, True, True]
        _, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(grad, x, weight, mean, var, *settings)
        sums = torch.stack([bias_grad, weight_grad])  # of dy and of dy · x̂, on this rank
        mean_grad, mean_product = ctx.ranks.all_reduce(sums.clone()).wait().div_(ctx.total)

        def channels(values: Tensor) -> Tensor:
            return values[:, None, None]

        inverse_std = torch.rsqrt(var + ctx.eps)
        scale = weight * inverse_std
        correction = (x - channels(mean)).mul_(channels(scale * inverse_std * mean_product))
        x_grad = (grad - channels(mean_grad)).mul_(channels(scale)).sub_(correction)
        return x_grad.to(x.dtype), weight_grad, bias_grad, None, None, None, None, None
