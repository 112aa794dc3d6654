"""Compiles every Triton kernel for an H100 or H200, without a GPU, and prints their names.

The interpreter runs kernels that the compiler rejects, e.g. with a constant that is assigned twice. This is a script
because Triton's interpreter must be off in its process.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastmoco.model.batchnorm.triton import split_batch_norm
from fastmoco.step.info_nce_triton import info_nce
from fastmoco.step.sgd_ema_triton import momentum_update
from pipelines.augment.presets import CIFAR, V1, V2
from pipelines.augment.resample_triton import ResidentPixels
from pipelines.augment.triton_ops import apply, crop_and_apply


class Hopper:
    """A driver that only reports the compilation target."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


_launch = JITFunction.run


def _compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    kernel: Any = _launch(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.asm["cubin"]
    print(self.__name__, flush=True)
    return kernel


def main() -> None:
    driver.set_active(Hopper())  # pyright: ignore[reportArgumentType]
    JITFunction.run = _compile
    scalar = torch.tensor(0.5, dtype=torch.float64)
    momentum_update(
        *torch.zeros(4, 4096),
        lr=scalar,
        ema_momentum=scalar,
        sgd_momentum=0.9,
        weight_decay=1e-4,
        num_decayed=100,
        ok=torch.tensor(True),
        scale=torch.tensor(2.0),
        zero_grads=True,
    )
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.zeros(64, 128, dtype=dtype)
        info_nce(q.requires_grad_(), torch.zeros_like(q), torch.zeros(4096, 128, dtype=dtype), 0.2)
    for dtype, relu, with_residual in ((torch.bfloat16, True, True), (torch.float16, True, False)):
        x = torch.zeros(16, 64, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)
        residual = torch.zeros_like(x).requires_grad_() if with_residual else None
        weight, bias, mean, var = torch.ones(4, 64)
        y = split_batch_norm(x.requires_grad_(), weight, bias, mean, var, 4, 0.1, 1e-5, relu, residual)
        y.backward(torch.zeros_like(y))
    rows = torch.zeros(2, dtype=torch.int64)
    resident = ResidentPixels(torch.zeros(600, dtype=torch.uint8), rows, torch.full((2, 2), 10).int(), planar=True)
    for augmentation, side in ((CIFAR, 32), (V1, 96), (V2, 96)):
        boxes, params = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 9)
        crop_and_apply(resident, boxes, params, augmentation, side, torch.bfloat16, rows)
        apply(torch.zeros(2, side, side, 3, dtype=torch.uint8), params, augmentation, torch.float16)


if __name__ == "__main__":
    main()
