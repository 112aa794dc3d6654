"""The operations of `fastmoco.model.pointwise.op` with the parameters of layers, under autocast and without.

N samples · I input channels · O output channels · H, W sides
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco.model.batchnorm.split import SplitBatchNorm2d
from fastmoco.model.pointwise import op
from fastmoco.model.pointwise.op import Pending


def convolve(
    x: Tensor | Pending, convolution: nn.Conv2d, norm: SplitBatchNorm2d, residual: Tensor | None = None
) -> tuple[Pending, Tensor | None]:
    """norm(convolution(x), relu=True, residual=residual) in training, pending, and x as applied (see `op.pointwise`).

    x (N, I, H, W) and residual (N, O, H, W); the convolution is 1×1, of stride 1 and without bias. As in torch's own
    convolution, under autocast x and the weight are converted to its type, unless they have it already. Raises
    ConfigError as `SplitBatchNorm2d` does.
    """
    assert convolution.kernel_size == convolution.stride == (1, 1), convolution
    assert convolution.bias is None
    values = x.y if isinstance(x, Pending) else x
    norm.check(values)
    device = values.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype
    x = x._replace(y=x.y.to(dtype)) if isinstance(x, Pending) else x.to(dtype)
    pending, applied = op.pointwise(x, convolution.weight.to(dtype), *_parameters(norm))
    return pending._replace(residual=None if residual is None else residual.to(dtype)), applied


def normalise_later(x: Tensor, norm: SplitBatchNorm2d) -> Pending:
    """norm(x, relu=True) in training, pending."""
    norm.check(x)
    return op.normalise_later(x, *_parameters(norm))


def _parameters(norm: SplitBatchNorm2d) -> tuple[op.Norm, int, float, float]:
    assert norm.momentum is not None
    return op.Norm(norm.weight, norm.bias, *norm.statistics()), norm.num_splits, norm.momentum, norm.eps
