"""Copying a saved state dict into live tensors, only where everything fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmoco.errors import CheckpointError


@torch.no_grad()
def copy_state(saved: Mapping[str, Mapping[str, Any]], live: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copies tensors, by group and name, into those of `live`.

    Raises CheckpointError, before anything is copied, where groups, names, shapes or types differ.
    """
    _check_names("the training step", saved, live)
    for group, tensors in live.items():
        _check_names(group, saved[group], tensors)
        for name, tensor in tensors.items():
            other = saved[group][name]
            if other.shape != tensor.shape or other.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{group} of {name} is {tuple(other.shape)} {other.dtype} in the checkpoint, expected "
                    f"{tuple(tensor.shape)} {tensor.dtype}; resume with the configuration it was saved with"
                )
    for group, tensors in live.items():
        for name, tensor in tensors.items():
            tensor.copy_(saved[group][name])


def _check_names(what: str, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing, surplus = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    if missing or surplus:
        raise CheckpointError(
            f"the checkpoint's state of {what} lacks {missing[:3]} and has {surplus[:3]} beside what this run needs; "
            "resume with the configuration it was saved with"
        )
