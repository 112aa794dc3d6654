"""Availability of the implementations of batch norm, loss, update and 1×1 convolutions, and of torch.compile."""

from __future__ import annotations

import os
import shutil

import torch

from fastmoco.errors import BackendMissingError, ConfigError
from fastmoco.registry import KERNELS
from pipelines.platforms import has_triton

FUSED = "triton-fused"
_FUSED_SINCE = 8  # compute capability; earlier tensor cores have no bfloat16, and their products spill registers


def own_kernels(kernels: str) -> str:
    """The implementation of what is not a convolution: "torch" or "triton"."""
    return "triton" if kernels == FUSED else kernels


def fuses_convolutions(device: torch.device) -> bool:
    """Whether the fused 1×1 convolutions run on this device: a GPU from compute capability 8.0 on, and Triton."""
    if triton_missing() is not None:
        return False
    from triton import knobs

    if device.type != "cuda":
        return knobs.runtime.interpret
    return torch.cuda.get_device_capability(device)[0] >= _FUSED_SINCE


def triton_missing() -> str | None:
    """Why Triton cannot be used, in one line; None if it is installed."""
    return None if has_triton() else "Triton is not installed (pip install triton)"


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot be used, in one line; None if it can. It needs Triton on a GPU, and a compiler."""
    cuda = device.type == "cuda"
    if cuda and (missing := triton_missing()) is not None:
        return missing
    language, usual = ("C", ("CC", "cc", "gcc", "clang")) if cuda else ("C++", ("CXX", "c++", "g++", "clang++"))
    if any(map(shutil.which, (os.environ.get(usual[0]) or usual[1], *usual[1:]))):
        return None
    return f"no {language} compiler is installed"


def check_kernels(kernels: str, device: torch.device) -> None:
    """Raise ConfigError for an unknown name, BackendMissingError if Triton is not installed or there is no such GPU.

    On a CPU, Triton runs only in its interpreter, enabled by TRITON_INTERPRET=1 before the import: for tests, about a
    thousand times slower than torch.
    """
    if kernels not in KERNELS:
        raise ConfigError(f"unknown kernels {kernels!r}; expected one of {', '.join(KERNELS)}")
    if kernels == "torch":
        return
    if triton_missing() is not None:
        raise BackendMissingError(f"--kernels {kernels}, but {triton_missing()}: install it, or use --kernels torch")
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise BackendMissingError(f"--kernels {kernels} needs a GPU, and the device is {device}: use --kernels torch")
    if kernels == FUSED and not fuses_convolutions(device):
        raise BackendMissingError(
            f"--kernels {kernels} needs a GPU of compute capability {_FUSED_SINCE}.0 or higher: use --kernels triton"
        )
