"""The projection head of an encoder, from the tensors that are left beside its backbone.

B batch · D features · C embedding
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn

_LAYER = re.compile(r"(?:(\d+)\.)?(weight|bias)")


def projection_head(tensors: Mapping[str, Tensor], feature_dim: int) -> nn.Sequential | None:
    """Features (B, D) → embeddings (B, C): linear layers with a ReLU between them, as in MoCo v1 and v2.

    tensors      weight and bias of one layer, or those of layers 0, 2, 4, …
    feature_dim  D

    None if there are no tensors, or those of another kind of head, such as one with batch norm.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None or tensor.ndim != (2 if match[2] == "weight" else 1):
            return None
        layers.setdefault(int(match[1] or 0), {})[match[2]] = tensor.float()
    numbers = sorted(layers)
    if not numbers or numbers != list(range(0, 2 * len(numbers), 2)) or any("weight" not in layers[n] for n in numbers):
        return None
    ordered = [layers[number] for number in numbers]
    widths = [feature_dim, *(len(layer["weight"]) for layer in ordered)]
    modules: list[nn.Module] = []
    for layer, (inputs, outputs) in zip(ordered, pairwise(widths), strict=True):
        if layer["weight"].shape[1] != inputs or ("bias" in layer and len(layer["bias"]) != outputs):
            return None
        linear = nn.Linear(inputs, outputs, bias="bias" in layer)
        linear.load_state_dict(layer)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1]).requires_grad_(False).eval()
