"""Which device, in which number format, and how strictly repeatable."""

from __future__ import annotations

import os

import torch

from fastmoco.errors import DeviceError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` to a device. Raises DeviceError where CUDA wrequested and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        built = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device or driver"
        raise DeviceError(f"--device cuda, and {built}: see nvidia-smi, or use --device cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_of_rank(name: str, local_rank: int, local_size: int) -> torch.device:
    """The device of one of several processes on this machine. Raises DeviceError where there are more of them."""
    if pick_device(name).type == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if local_size > found:
        raise DeviceError(
            f"{local_size} processes on this machine, and {found} CUDA device{'s' * (found != 1)}: "
            f"use --gpus {found}, or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_amp(name: str, device: torch.device) -> str:
    """`auto` to bf16 where the device multiplies it in hardware, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def describe(device: torch.device) -> str:
    """The device in words: its name, memory or cores."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU, {torch.get_num_threads()} threads"


def make_deterministic() -> None:
    """Bit-identical results on the same kind of device. To be called before CUDA is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
