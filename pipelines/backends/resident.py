"""Crops of a data set held decoded in device memory: nothing is read or decoded after the start.

N images · V views · B images per batch · S side of a crop · C channels
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.presets import Augmentation
from pipelines.augment.resample import crop_resize
from pipelines.augment.resize import resize_boxes, resize_centre, resize_centres
from pipelines.cpu_threads import parallel_for
from pipelines.data.index import ImageIndex
from pipelines.data.resident_pixels import load
from pipelines.platforms import has_triton
from pipelines.transfer import to_device_at_once
from pipelines.views import BatchPlan, Crops


class ResidentCrops:
    """A crop source over uint8 pixels on the device.

    On CUDA one Triton kernel crops a batch of images of any size. On a CPU, small images of one size are cropped by two
    matrix products, all others one by one; so they are for a CUDA device without Triton, and images of other channels
    than three on any, from the host's memory. Raises DataError if the data set does not fit.
    """

    def __init__(self, index: ImageIndex, side: int, device: torch.device, workers: int) -> None:
        self._side, self._device, self._channels = side, device, index.channels
        self._in_kernel = device.type == "cuda" and has_triton() and index.channels == 3
        self._resident = load(index, device if self._in_kernel else torch.device("cpu"), workers)
        self._offsets, self._sizes = self._resident.offsets.cpu().numpy(), index.sizes

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        for plan in plans:
            if plan.shorter:
                yield Crops(self._centred(plan), plan)
                continue
            if self._in_kernel:
                yield Crops(self._in_one_kernel(plan), plan)
                continue
            crops = self._all_at_once(plan) if self._resident.planar else self._one_by_one(plan)
            if self._device.type == "cuda":
                crops = crops.contiguous().pin_memory().to(self._device, non_blocking=True)
            yield Crops(crops, plan)

    def views(
        self,
        boxes: Tensor,
        params: Tensor,
        images: Tensor,
        augmentation: Augmentation,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Crops and colours with `triton_ops.crop_and_apply`: (V, 3, S, S).

        boxes (V, 4) int32, params (V, P) float32 and images (V,) int64, positions in the index, are on the device.
        """
        from pipelines.augment.triton_ops import crop_and_apply  # Triton comes with torch's CUDA builds only

        return crop_and_apply(self._resident, boxes, params, augmentation, self._side, dtype, images, out)

    def _in_one_kernel(self, plan: BatchPlan) -> Tensor:
        from pipelines.augment.resample_triton import crop

        views, count = plan.boxes.shape[:2]
        boxes, images = to_device_at_once([plan.boxes.reshape(-1, 4), np.tile(plan.indices, views)], self._device)
        return crop(self._resident, boxes, self._side, images).view(views, count, self._side, self._side, 3)

    def _centred(self, plan: BatchPlan) -> Tensor:
        """Views of the centre, on the device that has the images."""
        pixels, side = self._resident.pixels, self._side
        out = torch.empty((1, len(plan.indices), side, side, self._channels), dtype=torch.uint8, device=pixels.device)
        images = self._whole(plan.indices)
        if pixels.is_cuda:
            resize_centres(images, plan.shorter, out[0])
            return out

        def crop(row: int) -> None:
            resize_centre(images[row], plan.shorter, out[0, row])

        parallel_for(crop, range(len(images)))
        return out.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else out

    def _whole(self, indices: np.ndarray) -> list[Tensor]:
        """Each of these images, (H, W, C), without a copy."""
        if self._resident.planar:
            return [self._resident.pixels[image].permute(0, 2, 1) for image in indices.tolist()]
        images, channels = [], self._channels
        for image in indices.tolist():
            start, (height, width) = int(self._offsets[image]), self._sizes[image].tolist()
            pixels = self._resident.pixels[start : start + channels * height * width]
            images.append(pixels.view(height, width, channels))
        return images

    def _all_at_once(self, plan: BatchPlan) -> Tensor:
        views, count = plan.boxes.shape[:2]
        out = torch.empty((views, count, self._side, self._channels, self._side), dtype=torch.uint8)
        indices, boxes, pixels = torch.from_numpy(plan.indices), torch.from_numpy(plan.boxes), self._resident.pixels

        def crop(rows: slice) -> None:
            crop_resize(pixels.index_select(0, indices[rows]), boxes[:, rows], out[:, rows])

        size = -(-count // torch.get_num_threads())  # one slice per core
        parallel_for(crop, [slice(start, start + size) for start in range(0, count, size)])
        return out.permute(0, 1, 2, 4, 3)

    def _one_by_one(self, plan: BatchPlan) -> Tensor:
        views, count = plan.boxes.shape[:2]
        out = torch.empty((views, count, self._side, self._side, self._channels), dtype=torch.uint8)
        resize_boxes(self._whole(plan.indices), plan.boxes, out)
        return out

    def close(self) -> None:
        """Nothing to release: the memory is freed with the object."""
