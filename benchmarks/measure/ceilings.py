"""What a device reaches at most: square matrix products, by number format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmoco.device import DTYPES, pick_amp

MATRIX_SIDES = {"cuda": 8192, "cpu": 1024}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def format_of(dtype: torch.dtype, device: torch.device) -> str:
    """The number format of convolutions of this type: fp32, tf32, bf16 or fp16. cuDNN uses TF32 for float32."""
    name = _NAMES[dtype]
    return "tf32" if name == "fp32" and device.type == "cuda" else name


def formats_on(device: torch.device) -> tuple[str, ...]:
    """The formats that a device multiplies. A processor without bf16 instructions emulates bf16, far below fp32."""
    if device.type == "cuda":
        return ("fp32", "tf32", "bf16", "fp16")
    return tuple(dict.fromkeys(("fp32", pick_amp("auto", device))))


def matrix_product(name: str, device: torch.device, side: int) -> Callable[[], Tensor]:
    """A function that multiplies two square matrices of a number format: 2 · side³ FLOPs."""
    a, b = (torch.randn(side, side, device=device).to(DTYPES.get(name, torch.float32)) for _ in range(2))

    def product() -> Tensor:
        with _precision("high" if name == "tf32" else "highest"):
            return a @ b

    return product


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """Set the precision of float32 matrix products on CUDA: `highest` is float32, `high` is TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
