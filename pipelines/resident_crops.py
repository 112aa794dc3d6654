"""The whole decoded data set in device memory: nothing is read or decoded after the start.

N images · C channels · H, W sides in pixels · S side of a crop
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.errors import DataError
from pipelines.image_index import ImageIndex
from pipelines.resample import crop_resize
from pipelines.transfer import to_device
from pipelines.views import BatchPlan, Crops

# What may be filled: the rest is for the encoders, their activations and the optimiser.
SHARE_OF_FREE_MEMORY = 0.6


class ResidentCrops:
    """A crop source over uint8 pixels on the device.

    Images of one size are kept as (N, H, C, W) and cropped as one batch. Images of different sizes are kept one
    behind another in a flat buffer, and cropped one by one. Raises DataError where the data set does not fit.
    """

    def __init__(self, index: ImageIndex, side: int, device: torch.device, workers: int) -> None:
        self._side, self._device = side, device
        needed, free = resident_bytes(index), free_memory_bytes(device)
        if needed > SHARE_OF_FREE_MEMORY * free:
            raise DataError(
                f"--pipeline resident needs {needed / 2**30:.1f} GiB for {len(index):,} decoded images, and "
                f"{SHARE_OF_FREE_MEMORY:.0%} of the {free / 2**30:.1f} GiB free on {device} is less: use --pipeline "
                f"torch, or --limit {max(1, int(len(index) * SHARE_OF_FREE_MEMORY * free / needed))}"
            )
        self._sizes = index.sizes
        areas = index.sizes.astype(np.int64).prod(axis=1) * 3
        self._offsets = np.concatenate([[0], np.cumsum(areas)])
        flat = _read_all(index, self._offsets, workers)
        if index.uniform_size is not None:
            height, width = index.uniform_size
            planes = flat.view(len(index), height, width, 3).permute(0, 1, 3, 2).contiguous()
            self._pixels, self._uniform = planes.to(device), True
        else:
            self._pixels, self._uniform = flat.to(device), False

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        for plan in plans:
            if self._uniform:
                chosen = self._pixels[to_device(plan.indices, self._device)]
                yield Crops(crop_resize(chosen, to_device(plan.boxes, self._device), self._side), plan)
            else:
                yield Crops(self._one_by_one(plan), plan)

    def _one_by_one(self, plan: BatchPlan) -> Tensor:
        views, count = plan.boxes.shape[:2]
        side = self._side
        out = torch.empty((views, count, side, side, 3), dtype=torch.uint8, device=self._device)
        for row, image in enumerate(plan.indices.tolist()):
            height, width = self._sizes[image].tolist()
            start = int(self._offsets[image])
            pixels = self._pixels[start : start + 3 * height * width].view(height, width, 3)
            for view in range(views):
                out[view, row] = resize_box(pixels, plan.boxes[view, row].tolist(), side)
        return out

    def close(self) -> None:
        """Frees the memory."""
        self._pixels = torch.empty(0, dtype=torch.uint8)


def resize_box(pixels: Tensor, box: list[int], side: int) -> Tensor:
    """One antialiased bilinear crop: (H, W, 3) uint8 and (top, left, height, width) to (S, S, 3) uint8."""
    top, left, height, width = box
    region = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None]
    if pixels.is_cuda:  # CUDA has no uint8 kernel
        resized = F.interpolate(region.float(), size=(side, side), mode="bilinear", antialias=True)
        return resized[0].permute(1, 2, 0).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return F.interpolate(region, size=(side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def resident_bytes(index: ImageIndex) -> int:
    """Bytes of device memory that the decoded images take."""
    return int(index.sizes.astype(np.int64).prod(axis=1).sum()) * 3


def free_memory_bytes(device: torch.device) -> int:
    """What can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_all(index: ImageIndex, offsets: np.ndarray, workers: int) -> Tensor:
    """Every decoded image, one behind another: (sum of H·W·3,) uint8 on the host."""
    if index.pixels is not None:
        return torch.from_numpy(index.pixels).flatten()
    flat = np.empty(int(offsets[-1]), dtype=np.uint8)

    def read(chunk: range) -> None:
        for i in chunk:
            flat[offsets[i] : offsets[i + 1]] = index.read(i).reshape(-1)

    chunks = [range(start, min(start + 256, len(index))) for start in range(0, len(index), 256)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for _ in pool.map(read, chunks):
            pass
    return torch.from_numpy(flat)
