"""Implementations of batch norm, loss and update: torch's operations, or our Triton kernels."""

from __future__ import annotations

import importlib.util

import torch

from fastmoco.errors import BackendMissingError, ConfigError
from fastmoco.registry import KERNELS


def check_kernels(kernels: str, device: torch.device) -> None:
    """Raises ConfigError for an unknown name, BackendMissingError where Triton is not installed or has no device.

    Triton runs on the CPU only in its interpreter, which TRITON_INTERPRET=1 switches on before it is imported: for
    tests, some thousand times slower than torch.
    """
    if kernels not in KERNELS:
        raise ConfigError(f"unknown kernels {kernels!r}; expected one of {', '.join(KERNELS)}")
    if kernels == "torch":
        return
    if importlib.util.find_spec("triton") is None:
        raise BackendMissingError(
            "--kernels triton, and Triton is not installed: pip install triton, or use --kernels torch"
        )
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise BackendMissingError(f"--kernels triton needs a GPU, and the device is {device}: use --kernels torch")
