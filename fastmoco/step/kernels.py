"""Availability of the implementations of batch norm, loss and update: torch or Triton."""

from __future__ import annotations

import torch

from fastmoco.errors import BackendMissingError, ConfigError
from fastmoco.registry import KERNELS
from pipelines.platforms import has_triton


def triton_missing() -> str | None:
    """Why Triton cannot be used, in one line; None if it is installed."""
    return None if has_triton() else "Triton is not installed (pip install triton)"


def check_kernels(kernels: str, device: torch.device) -> None:
    """Raise ConfigError for an unknown name, BackendMissingError if Triton is not installed or there is no GPU.

    On a CPU, Triton runs only in its interpreter, enabled by TRITON_INTERPRET=1 before the import: for tests, about a
    thousand times slower than torch.
    """
    if kernels not in KERNELS:
        raise ConfigError(f"unknown kernels {kernels!r}; expected one of {', '.join(KERNELS)}")
    if kernels == "torch":
        return
    if triton_missing() is not None:
        raise BackendMissingError(f"--kernels triton, but {triton_missing()}: install it, or use --kernels torch")
    from triton import knobs

    if device.type != "cuda" and not knobs.runtime.interpret:
        raise BackendMissingError(f"--kernels triton needs a GPU, and the device is {device}: use --kernels torch")
