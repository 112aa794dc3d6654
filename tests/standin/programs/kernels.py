"""Compiles every Triton kernel as training launches it, and reports what each needs of a multiprocessor.

    python -m tests.standin.run kernels 7.5 9.0        for these compute capabilities

The launches are those of the recipes' own shapes on the stand-in: constants, types, alignment and number of warps.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastmoco.step.info_nce_triton import info_nce
from pipelines.augment.params import Column
from pipelines.augment.presets import BYOL, CIFAR, V1, V2, Augmentation
from pipelines.augment.resample_triton import ResidentPixels
from pipelines.augment.triton_ops import apply, crop_and_apply
from tests.standin import operators
from tests.standin.compiler import GpuTarget
from tests.standin.programs import step

MAIN = 90  # the architecture for which all types and shapes are compiled; for the others only one type each
BFLOAT16_SINCE = 80  # an earlier GPU trains in fp16
DISASSEMBLED_SINCE = 75  # by CUDA 13's tools
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VIEWS = ((CIFAR, 32), (V1, 224), (V2, 224))
MORE_VIEWS = ((V2, 64), (V2, 128), (BYOL, 224))
# N, K and C of losses beside those of the recipes: few queries, a queue that ends inside a block, wide embeddings.
LOSSES = ((64, 65536, 128), (256, 65000, 128), (256, 4096, 256))
TENSOR_CORES = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma")


class Target(GpuTarget):
    """A driver of Triton for one architecture, such as 90; it is a device of its own, with its own cached kernels."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


class Compilation:
    """Compiles each launch for one architecture, instead of running it."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.kernels: dict[int, Any] = {}  # by id: Triton returns the same object for the same constants and types
        driver.set_active(Target(architecture))  # pyright: ignore[reportArgumentType]
        torch.cuda.get_device_capability = lambda device=None: divmod(architecture, 10)  # some launches depend on it

    def __call__(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = _run(function, *args, grid=grid, warmup=True, **kwargs)
        self.kernels[id(kernel)] = kernel

    def report(self) -> Iterator[dict[str, Any]]:
        for kernel in self.kernels.values():
            needs = resources(kernel.asm["cubin"])
            if self.architecture >= DISASSEMBLED_SINCE:
                needs |= instructions(kernel.asm["cubin"])
            names = kernel.src.fn.arg_names
            constants = {names[path[0]]: str(value) for path, value in kernel.src.constants.items() if len(path) == 1}
            yield {
                "kernel": kernel.metadata.name,
                "architecture": self.architecture,
                "warps": kernel.metadata.num_warps,
                "shared_bytes": kernel.metadata.shared,
                "constants": constants,
                "tensor_core_instructions": sorted(set(TENSOR_CORES.findall(kernel.asm["ptx"]))),
            } | needs


_run = JITFunction.run


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and local memory, where registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(field.split(":") for field in text.split() if field.count(":") == 1 and field[0] != ":")
    return {"registers": int(fields["REG"]), "stack_bytes": int(fields["STACK"]), "local_bytes": int(fields["LOCAL"])}


def instructions(cubin: bytes) -> dict[str, int]:
    """Instructions of a kernel, and of its longest innermost loop: all, barriers, shuffles, those of tensor cores."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [(int(address, 16), words) for address, words in re.findall(r"/\*([0-9a-f]{4,5})\*/ +([^;]+);", text)]
    code = [(address, words) for address, words in found if not words.startswith("NOP")]
    jumps = [(address, re.search(r"BRA.* 0x([0-9a-f]+)", words)) for address, words in code]
    loops = [(int(match[1], 16), address) for address, match in jumps if match and int(match[1], 16) < address]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[words for address, words in code if first <= address <= last] for first, last in inner]
    body = max(bodies, key=len, default=[])

    def count(*names: str) -> int:
        return sum(re.search(rf"\b({'|'.join(names)})\b", words) is not None for words in body)

    return {
        "instructions": len(code),
        "loop_instructions": len(body),
        "loop_barriers": count("BAR"),
        "loop_shuffles": count("SHFL"),
        "loop_tensor_core": count("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA"),
    }


def launches(architecture: int) -> None:
    """Launch every kernel with the types in which such a GPU trains."""
    usual = "bf16" if architecture >= BFLOAT16_SINCE else "fp16"
    for amp in DTYPES if architecture == MAIN else (usual,):
        launch_step("cifar", amp)
        launch_step("imagenet", amp)
        if architecture >= BFLOAT16_SINCE:
            launch_step("imagenet-fused", amp)
        for augmentation, side in VIEWS + (MORE_VIEWS if architecture == MAIN else ()):
            launch_views(augmentation, side, DTYPES[amp])
        for sizes in LOSSES:
            launch_loss(*sizes, DTYPES[amp])
    torch.backends.cudnn.allow_tf32 = False
    launch_loss(256, 65536, 128, torch.float32)
    torch.backends.cudnn.allow_tf32 = True


def launch_loss(n: int, size: int, channels: int, dtype: torch.dtype) -> None:
    """InfoNCE of queries of a type and a float32 queue."""
    q, k, queue = (torch.empty(rows, channels, device="cuda") for rows in (n, n, size))
    info_nce(q.to(dtype), k, queue, temperature=0.1)


def launch_step(mode: str, amp: str) -> None:
    train_step, views = step.build(mode, amp=amp)
    train_step(views, step.LR, step.EMA_MOMENTUM)


def launch_views(augmentation: Augmentation, side: int, dtype: torch.dtype) -> None:
    """Augmentation from crops, and from images in device memory, of one size or of several."""
    count, device = 512, torch.device("cuda", 0)
    rows = torch.empty(count, dtype=torch.int64, device=device)
    boxes = torch.empty(count, 4, dtype=torch.int32, device=device)
    params = torch.empty(count, len(Column), device=device)

    def integers(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    apply(integers(count, side, side, 3, dtype=torch.uint8), params, augmentation, dtype, rows)
    for planar in (True, False):
        shape = (4, side, 3, side) if planar else (1 << 20,)
        pixels, sizes = integers(*shape, dtype=torch.uint8), integers(count, 2, dtype=torch.int32)
        resident = ResidentPixels(pixels, rows, sizes, planar=planar)
        crop_and_apply(resident, boxes, params, augmentation, side, dtype, rows)


def main() -> None:
    operators.install()
    compiled_functions: Any = JITFunction
    found: list[dict[str, Any]] = []
    for capability in sys.argv[1:]:
        major, minor = map(int, capability.split("."))
        compilation = Compilation(10 * major + minor)
        compiled_functions.run = partialmethod(compilation)
        launches(compilation.architecture)
        found += compilation.report()
    print(json.dumps({"kernels": found}))


if __name__ == "__main__":
    main()
