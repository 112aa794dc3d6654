"""Copying a saved state dict into live tensors, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmoco.errors import CheckpointError


@torch.no_grad()
def copy_state(saved: Mapping[str, Mapping[str, Any]], live: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy tensors, by group and name, into those of `live`.

    Raises CheckpointError, before anything is copied, if groups, names, shapes or types differ.
    """
    _check_names("the training step", saved, live)
    for group, tensors in live.items():
        _check_names(group, saved[group], tensors)
        for name, tensor in tensors.items():
            source = saved[group][name]
            if source.shape != tensor.shape or source.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{group} of {name} is {tuple(source.shape)} {source.dtype} in the checkpoint, expected "
                    f"{tuple(tensor.shape)} {tensor.dtype}; resume with the configuration it was saved with"
                )
    for group, tensors in live.items():
        for name, tensor in tensors.items():
            tensor.copy_(saved[group][name])


def _check_names(owner: str, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing, surplus = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    if missing or surplus:
        raise CheckpointError(
            f"the checkpoint's state of {owner} lacks {missing[:3]} and has an unexpected {surplus[:3]}; "
            "resume with the configuration it was saved with"
        )
