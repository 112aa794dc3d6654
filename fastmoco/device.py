"""Choice of device and number format, and deterministic algorithms."""

from __future__ import annotations

import os

import torch
import torch.utils.deterministic

from fastmoco.errors import DeviceError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_BF16 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private to torch, so that a version may lack them


def pick_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises DeviceError if CUDA is requested and unavailable."""
    if name == "cuda" and not torch.cuda.is_available():
        built = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device or driver"
        raise DeviceError(f"--device cuda, but {built}: see nvidia-smi, or use --device cpu")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_of_rank(name: str, local_rank: int, local_size: int) -> torch.device:
    """The device of one of `local_size` processes on this machine. Raises DeviceError if there are too few devices."""
    if pick_device(name).type == "cpu":
        return torch.device("cpu")
    devices = torch.cuda.device_count()
    if local_size > devices:
        raise DeviceError(
            f"{local_size} processes on this machine, but {devices} CUDA device{'s' * (devices != 1)}: "
            f"use --gpus {devices}, or --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_amp(name: str, device: torch.device) -> str:
    """The format for `auto`: bf16 where the hardware multiplies it, else fp16 on a GPU and fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in _CPU_BF16) else "fp32"


def describe(device: torch.device) -> str:
    """A GPU's name and memory, or the CPU's number of threads, as text."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread" + "s" * (threads != 1)


def out_of_memory(device: torch.device, batch: int, splits: int) -> DeviceError:
    """The error of a run whose batch, in `splits` batch norm groups, needs more memory than the device has."""
    smaller = max(2 * splits, batch // 2 // splits * splits)
    return DeviceError(
        f"{describe(device)} has too little memory for --batch-size {batch}: start again with --batch-size {smaller} "
        "--overwrite, or with --checkpoint-activations"
    )


def make_deterministic() -> None:
    """Make results bit-identical on the same kind of device. Call before CUDA is first used.

    torch would also fill every new tensor with NaN, one launch for each: nothing here reads memory before it is
    written, as the tests check.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False
