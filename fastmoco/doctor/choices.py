"""What `fastmoco train` would use on this machine, by the code that decides it."""

from __future__ import annotations

import numpy as np
import torch

from fastmoco.config import RunConfig
from fastmoco.doctor.findings import Finding, Target
from fastmoco.doctor.units import bytes_text
from fastmoco.run.resolve import resolve
from pipelines.backends.select import choose
from pipelines.data.index import ImageIndex
from pipelines.data.resident_pixels import SHARE_OF_FREE_MEMORY, free_memory_bytes

_SMALL = (50_000, 32, 32)  # CIFAR-10
_LARGE = (1_281_167, 400, 500)  # ImageNet


def choices(target: Target) -> Finding:
    """Settings that `train` fills in for small images, and its pipelines for small and for large data sets."""
    device = torch.device(target.device)
    config, _ = resolve(RunConfig().replace(data="images"), _images(*_SMALL), device)
    flat = config.flat()
    large, _ = choose("auto", _images(*_LARGE), device)
    limit = SHARE_OF_FREE_MEMORY * free_memory_bytes(device)
    names = ("amp", "kernels", "compile", "cuda_graph", "workers")
    figures = {name: flat[name] for name in names}
    figures |= {"device": str(device), "small_data_pipeline": flat["pipeline"], "large_data_pipeline": large}
    figures["resident_limit_bytes"] = int(limit)
    parts = [str(device), figures["amp"], f"{figures['kernels']} kernels"]
    parts += ["CUDA graph"] if figures["cuda_graph"] == "on" else []
    parts += [f"compile {figures['compile']}"] if figures["compile"] != "off" else []
    pipeline = flat["pipeline"]
    if pipeline != large:
        pipeline += f" for data sets of up to {bytes_text(limit)} decoded, else {large}"
    parts.append(f"pipeline {pipeline}")
    return Finding(text=", ".join(parts), figures=figures)


def _images(count: int, height: int, width: int) -> ImageIndex:
    """An index of that many images that take no memory."""
    pixels = np.broadcast_to(np.zeros(1, dtype=np.uint8), (count, height, width, 3))
    return ImageIndex.from_pixels("images", pixels)
