"""A model of the user's own, given in Python: `fastmoco.train(model=...)`. Its architecture is called own/CLASS.

B batch · S side of a view · D features
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmoco.errors import ConfigError
from fastmoco.model.batchnorm.convert import convert_batch_norm
from fastmoco.model.family import Layout, NormLayer, layout_of
from fastmoco.registry import OWN_PREFIX

_SIDE = 64  # of the images that the number of features is found with


class _Given(NamedTuple):
    module: nn.Module
    feature_dim: int


_GIVEN: ContextVar[_Given | None] = ContextVar("given", default=None)


@contextmanager
def own_model(module: nn.Module | None, side: int | None = None) -> Iterator[str | None]:
    """In this context, own/CLASS is this module; yields that name, or None without a module.

    module  (B, 3, S, S) float32 images → features (B, D), or (B, D, ...), of which the mean over the rest is taken; its
            weights are what training starts from, and it is copied, never changed
    side    S of the images that D is found with

    Raises ConfigError if it does not take images of that side, gives anything else, or cannot be trained as a whole.
    """
    if module is None:
        yield None
        return
    _check_trainable(module)
    token = _GIVEN.set(_Given(module, _feature_dim(module, side or _SIDE)))
    try:
        yield f"{OWN_PREFIX}{type(module).__name__}"
    finally:
        _GIVEN.reset(token)


class OwnFamily:
    """`fastmoco.model.family.NamedFamily` of the module of `own_model`."""

    @staticmethod
    def check(arch: str) -> None:
        _given(arch)

    @staticmethod
    def build(
        arch: str, *, width: float = 1.0, stem: str = "imagenet", norm_layer: NormLayer | None = None
    ) -> nn.Module:
        assert (width, stem) == (1, "imagenet"), (width, stem)
        model = copy.deepcopy(_given(arch).module)
        model.register_forward_hook(_pooled)
        if norm_layer is not None:
            convert_batch_norm(model, norm_layer)
        return model

    @staticmethod
    def feature_dim(arch: str, width: float) -> int:
        return _given(arch).feature_dim

    @staticmethod
    def layout(arch: str) -> Layout:
        return layout_of(_given(arch).module)

    @staticmethod
    def settings(arch: str) -> None:
        return None


def _given(arch: str) -> _Given:
    given = _GIVEN.get()
    if given is None:
        name = arch.removeprefix(OWN_PREFIX)
        raise ConfigError(
            f"{arch} is a model of your own, which only Python can give: fastmoco.train(model={name}(), ...), "
            f"fastmoco.load_backbone(RUN, model={name}())"
        )
    return given


def _pooled(module: nn.Module, inputs: Any, features: Tensor) -> Tensor:
    """(B, D, ...) → (B, D)."""
    return features if features.ndim == 2 else features.flatten(2).mean(dim=2)


def _feature_dim(module: nn.Module, side: int) -> int:
    images = torch.zeros(2, 3, side, side)
    name, was_training = type(module).__name__, module.training
    try:
        with torch.no_grad():
            features = module.eval()(images)
    except Exception as error:
        raise ConfigError(
            f"{name} fails on images of {list(images.shape)}: {' '.join(str(error).split())[:200]}; give crop_size, or "
            "a model that takes them"
        ) from error
    finally:
        module.train(was_training)
    if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != 2:
        actual = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise ConfigError(f"{name} gives {actual} for two images, expected features (2, D) or (2, D, ...)")
    return features.shape[1]


def _check_trainable(module: nn.Module) -> None:
    name = type(module).__name__
    parameters = dict(module.named_parameters())
    if not parameters:
        raise ConfigError(f"{name} has no parameters to train")
    for kind, tensors in (("parameter", parameters), ("buffer", dict(module.named_buffers()))):
        for tensor_name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ConfigError(
                    f"the {kind} {tensor_name} of {name} is {tensor.dtype}, expected torch.float32: call model.float()"
                )
    frozen = next((n for n, parameter in parameters.items() if not parameter.requires_grad), None)
    if frozen is not None:
        raise ConfigError(f"{frozen} of {name} is frozen, and all parameters are trained: model.requires_grad_(True)")
    if any(parameter.device.type != "cpu" for parameter in parameters.values()):
        raise ConfigError(f"{name} is not on the CPU, from where it is copied: call model.cpu()")
