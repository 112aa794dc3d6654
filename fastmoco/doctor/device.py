"""The device that training would use: what it is, its state, and its rates of arithmetic and copies."""

from __future__ import annotations

from typing import Any

import torch

from fastmoco.device import DTYPES, pick_amp, pick_device
from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.doctor.units import bytes_text, seconds_per_call, si
from fastmoco.nvml import gpu_state, gpus_of_driver

_SIDE = {"cuda": 8192, "cpu": 768}  # of the matrices that are multiplied
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
_LINK_BYTES = 2**27


def device(target: Target) -> Finding:
    """The device for `--device`, under "device" of the figures."""
    chosen = pick_device(target.device)
    if chosen.type == "cpu":
        return _cpu(target.device)
    properties = torch.cuda.get_device_properties(chosen)
    free, total = torch.cuda.mem_get_info(chosen)
    sum_of_ones = torch.ones(8, device=chosen).sum().item()  # raises where torch has no code for this architecture
    capability = f"{properties.major}.{properties.minor}"
    figures: dict[str, Any] = {
        "device": str(chosen),
        "visible": torch.cuda.device_count(),
        "name": properties.name,
        "capability": capability,
        "multiprocessors": properties.multi_processor_count,
        "free_bytes": free,
        "total_bytes": total,
        "amp": pick_amp("auto", chosen),
    }
    figures |= gpu_state(str(properties.uuid))
    texts = [f"{properties.name} (capability {capability}), {bytes_text(free)} free of {bytes_text(total)}"]
    if figures["visible"] > 1:
        texts.append(f"the first of {figures['visible']}")
    if "pcie" in figures:
        texts.append(figures["pcie"])
    if "power_limit_w" in figures:
        texts.append(f"{figures['power_limit_w']:.0f} W")
    if sum_of_ones != 8:
        text = f"{properties.name} is faulty: the sum of 8 ones is {sum_of_ones:g}"
        advice = "see nvidia-smi and dmesg; reset or reboot it"
        return Finding(status=Status.FAILED, text=text, figures=figures, advice=advice)
    return Finding(text=", ".join(texts), figures=figures, advice="; ".join(_device_advice(figures)))


def _cpu(wanted: str) -> Finding:
    figures: dict[str, Any] = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "amp": pick_amp("auto", torch.device("cpu")),
    }
    text = f"CPU, {figures['threads']} threads, {figures['amp']}"
    unused = [] if wanted == "cpu" or torch.cuda.is_available() else gpus_of_driver()
    if not unused:
        return Finding(text=text, figures=figures)
    if torch.version.cuda is None:
        why, how = "torch is built without CUDA", "pip install --force-reinstall torch torchvision"
    else:
        why, how = "torch finds no CUDA device", "check CUDA_VISIBLE_DEVICES and the version of the driver"
    return Finding(
        status=Status.MISSING,
        text=f"{text}; {why}, but the driver lists {', '.join(unused)}",
        figures=figures | {"gpus_of_driver": unused},
        advice=f"the GPU trains 10 to 100 times as fast: {how} (torch has CUDA {torch.version.cuda})",
    )


def _device_advice(figures: dict[str, Any]) -> list[str]:
    advice = []
    if figures.get("other_processes", 0) > 0 and figures["free_bytes"] < 0.9 * figures["total_bytes"]:
        advice.append("another process uses this GPU (nvidia-smi): both are slower")
    if figures.get("slowed_by"):
        advice.append(f"its clock is reduced by {', '.join(figures['slowed_by'])}: see nvidia-smi -q -d PERFORMANCE")
    if figures.get("power_limit_w", 0) < 0.9 * figures.get("power_limit_default_w", 0):
        advice.append(f"its power limit is below the default of {figures['power_limit_default_w']:.0f} W")
    if figures.get("pcie_width", 0) < figures.get("pcie_max_width", 0):
        advice.append(f"it has {figures['pcie_width']} of {figures['pcie_max_width']} PCIe lanes: check the slot")
    return advice


def arithmetic(target: Target) -> Finding:
    """FLOP/s of a square matrix product in each number format."""
    side, figures = _SIDE[torch.device(target.device).type], {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(side, side, device=target.device).to(dtype) for _ in range(2))
        figures[f"{name}_flop_per_s"] = 2 * side**3 / seconds_per_call(lambda a=a, b=b: a @ b, target.device)
    text = ", ".join(f"{name} {si(figures[f'{name}_flop_per_s'], 'FLOP/s')}" for name in DTYPES)
    return Finding(text=f"products of {side}×{side}: {text}", figures=figures | {"side": side})


def copies(target: Target) -> Finding:
    """Bytes/s of a copy in the device's memory, read and write counted; on a GPU also to and from pinned memory."""
    chosen = torch.device(target.device)
    size = _COPY_BYTES[chosen.type]
    if chosen.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(chosen)[0] // 4)
    source = torch.ones(size, dtype=torch.uint8, device=chosen)
    copy = torch.empty_like(source)
    figures = {"memory_bytes_per_s": 2 * size / seconds_per_call(lambda: copy.copy_(source), target.device)}
    if chosen.type != "cuda":
        return Finding(text=f"memory {si(figures['memory_bytes_per_s'], 'B/s')}", figures=figures)
    pinned = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    on_device = source[:_LINK_BYTES]
    to_device_s = seconds_per_call(lambda: on_device.copy_(pinned, non_blocking=True), target.device)
    to_host_s = seconds_per_call(lambda: pinned.copy_(on_device, non_blocking=True), target.device)
    figures |= {
        "host_to_device_bytes_per_s": len(on_device) / to_device_s,
        "device_to_host_bytes_per_s": len(on_device) / to_host_s,
    }
    text = (
        f"memory {si(figures['memory_bytes_per_s'], 'B/s')}, from pinned host memory "
        f"{si(figures['host_to_device_bytes_per_s'], 'B/s')}, to it "
        f"{si(figures['device_to_host_bytes_per_s'], 'B/s')}"
    )
    slow = figures["host_to_device_bytes_per_s"] < 3e9
    advice = "a slow link: a GPU in a ×4 slot or a virtual machine; prefer --pipeline resident or dali" if slow else ""
    return Finding(text=text, figures=figures, advice=advice)
