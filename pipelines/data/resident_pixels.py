"""The decoded data set in one buffer on the device.

N images · H, W sides of an image in pixels · C channels
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.data.index import ImageIndex
from pipelines.errors import DataError
from pipelines.host_memory import available_bytes

# Share that the images may fill: the rest is for the encoders, their activations and the optimiser.
SHARE_OF_FREE_MEMORY = 0.6
_IMAGES_PER_TASK = 256
# Largest side at which a CPU crops by dense matrix products over whole images: 0.03 ms of one core per image at 32 px,
# but 4 ms at 224 px, where cropping one by one takes 0.2 ms.
DENSE = 64


@dataclass(frozen=True, slots=True)
class ResidentPixels:
    """Decoded images in device memory, concatenated.

    pixels   uint8, contiguous: (N, H, C, W) if planar, else flat (sum of H·W·C,)
    offsets  (N,) int64, start of each image
    sizes    (N, 2) int32, height and width
    planar   whether a row of an image is (C, W) rather than (W, C): images of one size, on a CPU only small ones
    """

    pixels: Tensor
    offsets: Tensor
    sizes: Tensor
    planar: bool


def load(index: ImageIndex, device: torch.device, workers: int) -> ResidentPixels:
    """Decodes every image. Raises DataError if one is bad, or if they do not fit."""
    needed, free, where = tightest(index, device)
    if needed > SHARE_OF_FREE_MEMORY * free:
        fitting = max(1, int(len(index) * SHARE_OF_FREE_MEMORY * free / needed))
        raise DataError(
            f"--pipeline resident needs {needed / 2**30:.1f} GiB for {len(index):,} decoded images, more than "
            f"{SHARE_OF_FREE_MEMORY:.0%} of the {free / 2**30:.1f} GiB free on {where}: use another --pipeline, or "
            f"--limit {fitting}"
        )
    ends = np.cumsum(index.sizes.astype(np.int64).prod(axis=1) * index.channels)
    offsets = np.concatenate([[0], ends[:-1]])
    height, width = index.uniform_size or (0, 0)
    planar = height > 0 and (device.type == "cuda" or max(height, width) <= DENSE)
    flat = _read_all(index, offsets, int(ends[-1]), workers, planar)
    if planar:
        flat = flat.view(len(index), height, index.channels, width)
    sizes = torch.from_numpy(np.ascontiguousarray(index.sizes))
    return ResidentPixels(flat.to(device), torch.from_numpy(offsets).to(device), sizes.to(device), planar)


def resident_bytes(index: ImageIndex) -> int:
    """Bytes of device memory that the decoded images take."""
    return int(index.sizes.astype(np.int64).prod(axis=1).sum()) * index.channels


def tightest(index: ImageIndex, device: torch.device) -> tuple[int, int, str]:
    """(bytes that the decoded images take, bytes free, where): on the device, or on the host, whichever has less.

    On their way to a GPU they are all in the host's memory, unless they are there before.
    """
    needed, free = resident_bytes(index), free_memory_bytes(device)
    if device.type == "cuda" and index.pixels is None and (on_host := available_bytes()) < free:
        return needed, on_host, "the host, through which they go"
    return needed, free, str(device)


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of a device; of the host for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes()


def _read_all(index: ImageIndex, offsets: np.ndarray, total_bytes: int, workers: int, planar: bool) -> Tensor:
    """All decoded images, concatenated: flat uint8 on the host; each row as (C, W) if `planar`.

    The images are in memory once, and one more for every worker.
    """
    if index.pixels is not None:
        pixels = torch.from_numpy(index.pixels)
        return (pixels.permute(0, 1, 3, 2) if planar else pixels).flatten()
    flat, stopped = np.empty(total_bytes, dtype=np.uint8), threading.Event()

    def read(chunk: range) -> None:
        for i in chunk:
            if stopped.is_set():
                return
            pixels = index.read(i)
            pixels = pixels.transpose(0, 2, 1) if planar else pixels
            flat[offsets[i] : offsets[i] + pixels.size] = pixels.reshape(-1)

    starts = range(0, len(index), _IMAGES_PER_TASK)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for _ in pool.map(read, [range(start, min(start + _IMAGES_PER_TASK, len(index))) for start in starts]):
                pass
        except BaseException:  # a bad image or a signal: tasks that have begun would take seconds
            stopped.set()
            raise
    return torch.from_numpy(flat)
