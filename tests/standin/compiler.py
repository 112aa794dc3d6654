"""torch.compile on the stand-in: Inductor plans its kernels as for a GPU, and their launches are counted.

Triton compiles none of them, which would take minutes, so that this shows nothing about their code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile

from tests.standin.runtime import launch


class GpuTarget:
    """A driver of Triton that only reports what to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)


class PlannedKernel:
    """What Inductor's generated code calls."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *arguments: Any, stream: int, **options: Any) -> None:
        launch(f"inductor {self.name}", stream)


def _planned(self: AsyncCompile, kernel_name: str, source_code: str, device_str: str = "cuda") -> PlannedKernel:
    return PlannedKernel(kernel_name)


def install() -> None:
    """Replace the compilation of Inductor's Triton kernels in this process."""
    try:
        from triton.runtime import driver
    except ImportError:
        return
    driver.set_active(GpuTarget())  # pyright: ignore[reportArgumentType]
    AsyncCompile.triton = _planned
    config.compile_threads = 1
    config.force_disable_caches = True  # a cache on disk would hold kernels that were compiled for a GPU
