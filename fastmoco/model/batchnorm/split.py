"""Batch normalisation over groups of a batch, as if each group were on its own device.

N samples · C channels · H, W sides · s splits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.distributed.world import World
from fastmoco.errors import ConfigError
from fastmoco.model.batchnorm import cpu as batchnorm_cpu
from fastmoco.model.batchnorm.sync import group_batch_norm


class SplitBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with training statistics of N/s consecutive samples instead of all N.

    With group g the rows gN/s … (g+1)N/s − 1, for each channel:

        y[g] = weight · (x[g] − mean(x[g])) / sqrt(var(x[g]) + eps) + bias          var biased, over N/s · H · W values
        running ← (1 − momentum) · running + momentum · mean over g of (mean(x[g]), var(x[g]) unbiased)

    MoCo needs it: with statistics over the whole batch, a query can identify its key by the statistics they share
    (He et al. 2020, section 3.3, "Shuffling BN"). In evaluation it is `nn.BatchNorm2d`.

    The following operations of a block can be fused into it: `forward(x, relu, residual)` is relu(y + residual), each
    if given, with a residual of the shape and type of x. With `twice` it returns the result two times, for two uses;
    with `pool` it is max_pool2d(relu(y), 3, stride=2, padding=1), two times.

    Input x (N, C, H, W) of any floating type → the same shape and type; the statistics have the type of the parameters,
    float32, under autocast too. A group of channels-last rows is itself dense and channels-last, so each group is one
    call of the native kernel: on a CPU in `fastmoco.model.batchnorm.cpu`, elsewhere followed by a concatenation.
    Explicit reductions in torch took 5 to 25 times as long on one core, folding the groups into the channels (which
    copies to NCHW) 4 to 8 times.

    kernels             "torch", or "triton" for `fastmoco.model.batchnorm.triton` in training: see `use_kernels`
    ranks               world of the ranks that share a group, or None; N counts this rank's samples: `divide_groups`
    updates_statistics  False while a forward is repeated only to recompute activations: see `freeze_running_stats`

    `num_batches_tracked` stays 0: only a cumulative average needs it, and it would cost a kernel per layer and step.

    Raises ConfigError if N is not a multiple of s, or a group has one value per channel.
    """

    def __init__(self, num_features: int, num_splits: int = 1, eps: float = 1e-5, momentum: float = 0.1) -> None:
        if num_splits < 1:
            raise ConfigError(f"the number of batch norm splits is {num_splits}; give 1 (no split) or more")
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.num_splits = num_splits
        self.kernels = "torch"
        self.ranks: World | None = None
        self.updates_statistics = True

    def forward(
        self,
        input: Tensor,
        relu: bool = False,
        residual: Tensor | None = None,
        twice: bool = False,
        pool: bool = False,
    ) -> Any:  # a Tensor, or with `twice` or `pool` two of them
        assert not (pool and residual is not None)
        if self.training and self.ranks is None and self.kernels == "triton":
            self.check(input)
            # Triton comes with torch's CUDA builds only
            if pool:
                from fastmoco.model.batchnorm.triton_pool import split_batch_norm_pool

                return self._fused(split_batch_norm_pool, input)
            from fastmoco.model.batchnorm.triton import split_batch_norm

            return self._fused(split_batch_norm, input, relu, residual, twice)
        y = self._forward(input, relu or pool, residual)
        y = F.max_pool2d(y, 3, stride=2, padding=1) if pool else y
        return (y, y) if twice or pool else y

    def _forward(self, input: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
        if self.training:
            self.check(input)
            if self.ranks is not None:
                assert self.momentum is not None
                statistics = self.statistics()
                y = group_batch_norm(input, self.weight, self.bias, *statistics, self.momentum, self.eps, self.ranks)
            elif input.device.type == "cpu" and not torch.compiler.is_compiling():
                return self._fused(batchnorm_cpu.split_batch_norm, input, relu, residual)
            else:
                y = self._groups(input)
        else:
            y = super().forward(input)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if relu else y

    def check(self, input: Tensor) -> None:
        """Raise ConfigError if a batch of this shape cannot be normalised in training."""
        rows, rest = divmod(input.shape[0], self.num_splits)
        if rest or rows == 0:
            raise ConfigError(
                f"a batch of {input.shape[0]} samples does not divide into {self.num_splits} batch norm splits; "
                f"use a batch that is a multiple of {self.num_splits}, or fewer splits"
            )
        if rows * input.shape[2] * input.shape[3] == 1:
            raise ConfigError(
                f"each of the {self.num_splits} batch norm splits has one sample of 1×1 pixels, and so no variance; "
                "use a larger batch, larger images or fewer splits"
            )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance to update: the layer's, or copies to discard."""
        mean, variance = self.running_mean, self.running_var
        assert mean is not None
        assert variance is not None
        return (mean, variance) if self.updates_statistics else (mean.clone(), variance.clone())

    def _fused(self, function: Callable[..., Any], input: Tensor, *more: Any) -> Any:
        statistics = self.statistics()
        return function(input, self.weight, self.bias, *statistics, self.num_splits, self.momentum, self.eps, *more)

    def _groups(self, input: Tensor) -> Tensor:
        running_mean, running_var = self.statistics()
        if self.num_splits == 1:
            return self._normalise(input, running_mean, running_var)
        means = running_mean.repeat(self.num_splits, 1)
        variances = running_var.repeat(self.num_splits, 1)
        groups = input.split(len(input) // self.num_splits)
        normalised = [self._normalise(group, means[i], variances[i]) for i, group in enumerate(groups)]
        if self.updates_statistics:
            with torch.no_grad():
                running_mean.copy_(means.mean(dim=0))
                running_var.copy_(variances.mean(dim=0))
        return torch.cat(normalised)

    def _normalise(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        assert self.momentum is not None
        return F.batch_norm(
            x, running_mean, running_var, self.weight, self.bias, training=True, momentum=self.momentum, eps=self.eps
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_splits={self.num_splits}"


def use_kernels(module: nn.Module, kernels: str) -> None:
    """Set the training kernels of a module's batch norms: "torch" or "triton" (see `step.kernels.check_kernels`)."""
    for layer in _layers(module):
        layer.kernels = kernels


def divide_groups(module: nn.Module, world: World) -> None:
    """Distribute the groups of a batch over the ranks, so that batch norm computes the same for any number of ranks.

    With s splits and R ranks, a rank has s/R whole groups, or shares one with R/s − 1 others (with all of them if s is
    1, which is synchronised batch norm). Raises ConfigError if neither is a whole number.
    """
    for layer in _layers(module):
        splits, size = layer.num_splits, world.size
        if splits % size == 0:
            layer.num_splits = splits // size
        elif size % splits == 0:
            layer.num_splits, layer.ranks = 1, world.subgroup(splits)
        else:
            raise ConfigError(
                f"{splits} batch norm splits cannot be distributed over {size} devices: one number must divide the "
                f"other; use --bn-splits {size}, or 1 for one group over all devices"
            )


def shares_groups(module: nn.Module) -> bool:
    """Whether a group of its batch norms is on several ranks."""
    return any(layer.ranks is not None for layer in _layers(module))


@contextmanager
def freeze_running_stats(module: nn.Module) -> Iterator[None]:
    """In this context, a training forward gives the same output but leaves the running statistics unchanged."""
    layers = _layers(module)
    before = [layer.updates_statistics for layer in layers]
    try:
        for layer in layers:
            layer.updates_statistics = False
        yield
    finally:
        for layer, updates in zip(layers, before, strict=True):
            layer.updates_statistics = updates


def _layers(module: nn.Module) -> list[SplitBatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, SplitBatchNorm2d)]
