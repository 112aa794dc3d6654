"""Split batch norm in place of the batch norm of any model, by the types of its modules.

N samples · C channels · H, W sides
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmoco.errors import ConfigError
from fastmoco.model.batchnorm.split import SplitBatchNorm2d
from fastmoco.model.family import NormLayer


class SplitBatchNormAct2d(SplitBatchNorm2d):
    """Split batch norm and the activation after it, in one module as timm's `BatchNormAct2d` is: act(drop(bn(x)))."""

    def __init__(self, num_features: int, num_splits: int, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_features, num_splits)
        self.drop, self.act = drop, act

    def forward(self, input: Tensor, **fused: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert not fused, "operations are fused into the batch norm of our own ResNets only"
        if isinstance(self.act, nn.ReLU) and isinstance(self.drop, nn.Identity):
            return super().forward(input, relu=True)
        return self.act(self.drop(super().forward(input)))


def convert_batch_norm(model: nn.Module, norm_layer: NormLayer) -> int:
    """Replace every `nn.BatchNorm2d` in a model, also timm's `BatchNormAct2d`; returns how many there were.

    Parameters, statistics, eps, momentum and names stay. Layer norm, group norm and the like are left as they are.

    norm_layer  channels → `SplitBatchNorm2d`

    Raises ConfigError for batch norm of another kind, which would see the whole batch at once (He et al. 2020, section
    3.3), and for one without scale and shift, without statistics or with a cumulative average.
    """
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    for name, layer in found:
        _check(name or "the model", layer)
        split = norm_layer(layer.num_features)
        assert isinstance(split, SplitBatchNorm2d)
        if type(layer) is not nn.BatchNorm2d:
            parts: Any = layer
            split = SplitBatchNormAct2d(layer.num_features, split.num_splits, parts.drop, parts.act)
        split.eps, split.momentum = layer.eps, layer.momentum
        split.weight, split.bias = layer.weight, layer.bias
        for buffer, value in layer.named_buffers(recurse=False):
            setattr(split, buffer, value)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, split)
    return len(found)


def _check(name: str, layer: _BatchNorm) -> None:
    if not isinstance(layer, nn.BatchNorm2d):
        raise ConfigError(
            f"the model has {type(layer).__name__} ({name}), and only BatchNorm2d is split into groups as MoCo needs "
            "it: leave layers after the pooling to the projection head (mlp, head), or use layer norm"
        )
    own = type(layer).forward is not nn.BatchNorm2d.forward
    if own and not all(isinstance(getattr(layer, part, None), nn.Module) for part in ("drop", "act")):
        raise ConfigError(
            f"the model has a batch norm of its own kind, {type(layer).__name__} ({name}): use torch.nn.BatchNorm2d"
        )
    if not (layer.affine and layer.track_running_stats) or layer.momentum is None:
        lacks = "scale and shift" if not layer.affine else "running statistics of a fixed momentum"
        raise ConfigError(f"{type(layer).__name__} ({name}) of the model has no {lacks}, which split batch norm needs")


def normalisation(model: nn.Module) -> str:
    """The normalisation layers of a model that are not split batch norm, in words: `LayerNorm2d`; empty if none."""
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, torch.nn.modules.instancenorm._InstanceNorm)
    return ", ".join(sorted({type(layer).__name__ for layer in model.modules() if isinstance(layer, kinds)}))
