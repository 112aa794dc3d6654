"""Convolutional models of timm: `--arch timm/NAME`.

B batch · S side of a view · D features
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fastmoco.errors import ConfigError
from fastmoco.model.architectures import check_installed
from fastmoco.model.batchnorm.convert import convert_batch_norm
from fastmoco.model.family import Layout, ModelSettings, NormLayer, layout_of
from fastmoco.registry import TIMM_PREFIX

# Parameters and modules of self-attention and of token mixing: these are no convolutional networks.
_TOKENS = re.compile(
    r"(.*\.)?(qkv|qkv_proj|q|k|q_proj|kv|query|to_q|to_qkv|pos_embed|cls_token|attention_biases|"
    r"relative_position_bias_table|rel_pos|mlp_tokens|token_mixer\.\w*qkv)(\..*|$)"
)


class TimmFamily:
    """`fastmoco.model.family.NamedFamily` of the names of `timm.list_models()`."""

    @staticmethod
    def check(arch: str) -> None:
        name = arch.removeprefix(TIMM_PREFIX)
        check_installed(arch)
        import timm

        if not timm.is_model(name):
            close = get_close_matches(name[:80], timm.list_models(), n=3, cutoff=0)
            raise ConfigError(f"timm has no model {name[:80]!a}; did you mean {' or '.join(close)}?")
        _structure(arch)

    @staticmethod
    def build(
        arch: str, *, width: float = 1.0, stem: str = "imagenet", norm_layer: NormLayer | None = None
    ) -> nn.Module:
        """timm's model without its classifier, in training with split batch norm: (B, 3, S, S) → (B, D).

        Raises ConfigError for an unknown name and a network that is not convolutional, BackendMissingError without
        timm.
        """
        assert (width, stem) == (1, "imagenet"), (width, stem)
        TimmFamily.check(arch)
        if norm_layer is not None:
            model = _create(arch)
            convert_batch_norm(model, norm_layer)
            return model
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # buffers that no file has need their values
            return _create(arch)

    @staticmethod
    def feature_dim(arch: str, width: float) -> int:
        TimmFamily.check(arch)
        return _structure(arch)[1]

    @staticmethod
    def layout(arch: str) -> Layout:
        TimmFamily.check(arch)
        return _structure(arch)[0]

    @staticmethod
    def settings(arch: str) -> ModelSettings:
        """Raises as `check`."""
        TimmFamily.check(arch)
        return _structure(arch)[2]


def _create(arch: str) -> nn.Module:
    import timm

    return timm.create_model(arch.removeprefix(TIMM_PREFIX), pretrained=False, num_classes=0)


@lru_cache(maxsize=8)
def _structure(arch: str) -> tuple[Layout, int, ModelSettings]:
    """Tensors, D and settings of a model, without memory for its weights. Raises ConfigError."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = _create(arch).eval()
        _refuse_tokens(arch, model)
        config: Any = model.pretrained_cfg
        side = int(config["input_size"][-1])
        with torch.no_grad():
            features = model(torch.empty(2, 3, max(side, 64), max(side, 64)))
    if features.ndim != 2:
        raise ConfigError(f"{arch} gives features {list(features.shape)}, expected (batch, features)")
    classifier = config.get("classifier") or ()
    head = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    stages = getattr(model, "feature_info", None)
    last = list(stages)[-1] if stages else {}
    return (
        layout_of(model, tuple(f"{name}." for name in head)),
        features.shape[1],
        ModelSettings(side, tuple(config["mean"]), tuple(config["std"]), last.get("reduction")),
    )


def _refuse_tokens(arch: str, model: nn.Module) -> None:
    """Raise ConfigError for a transformer or an MLP of tokens."""
    config: Any = getattr(model, "pretrained_cfg", {})
    tokens = next((name for name, _ in model.named_parameters() if _TOKENS.fullmatch(name)), None)
    if tokens is None and not config.get("fixed_input_size"):
        return
    why = f"it mixes tokens ({tokens})" if tokens else "it takes images of one size only"
    raise ConfigError(
        f"{arch} is no convolutional network, {why}: MoCo with SGD and batch norm is for convolutional ones, and "
        "transformers need MoCo v3, which fastmoco does not have; use a model such as timm/resnet50, "
        "timm/regnety_008, timm/efficientnet_b0 or timm/convnext_tiny"
    )
