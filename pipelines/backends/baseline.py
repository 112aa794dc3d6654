"""The baseline: the input pipeline most people train with, well tuned.

torchvision's transforms on PIL images in DataLoader workers, which return float views. It draws its own random numbers:
its views have the same distribution as those of the other pipelines but not the same values, and a resumed run sees
different views from an uninterrupted one.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms as T

from pipelines.augment.presets import Augmentation
from pipelines.data.index import ImageIndex
from pipelines.errors import DataError
from pipelines.plan.planner import Planner
from pipelines.transfer import to_device
from pipelines.views import Views
from pipelines.workers import checked, worker_options


class DataLoaderPipeline:
    """Yields Views like TwoViewPipeline; only the cast and the key shuffle run on the device."""

    def __init__(
        self, index: ImageIndex, planner: Planner, side: int, device: torch.device, dtype: torch.dtype, workers: int
    ) -> None:
        self.planner, self._device, self._dtype, self._workers = planner, device, dtype, workers
        transform = torchvision_transform(planner.augmentation, side)
        # The keys of a rank may be of different images from its queries: see `Planner.shares`.
        self._separate_keys = planner.world_size > 1 and planner.shuffle_keys
        self._images = _Images(index, transform, views=1 if self._separate_keys else 2)

    def views(self, start: int, stop: int) -> Iterator[Views]:
        """The batches of steps `start` to `stop` - 1. Raises DataError for a bad image or a worker that died."""
        loader = DataLoader(
            self._images,
            batch_sampler=(self._images_of(step) for step in range(start, stop)),
            collate_fn=_collate,
            **worker_options(self._workers, self._device),
        )
        for step, (*images, index) in enumerate(checked(loader), start):
            order = to_device(self.planner.key_order(step), self._device)
            query, key = (self._move(half) for half in (images[0].chunk(2) if self._separate_keys else images))
            if self.planner.world_size == 1:
                key = key[order]
            yield Views(query, key, order, index[: len(query)].to(self._device, non_blocking=True))

    def _images_of(self, step: int) -> list[int]:
        queries, keys = self.planner.shares(step)
        return [*queries.tolist(), *keys.tolist()] if self._separate_keys else queries.tolist()

    def _move(self, images: Tensor) -> Tensor:
        images = images.to(self._device, non_blocking=True)
        return images.to(self._dtype, memory_format=torch.channels_last)

    def close(self) -> None:
        """Nothing to release: the workers belong to the iterators."""


def torchvision_transform(augmentation: Augmentation, side: int) -> Callable[[Image.Image], Tensor]:
    """PIL image to (3, S, S) float32 normalised, with torchvision's own random numbers."""
    a = augmentation
    jitter = T.RandomApply([T.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)], p=a.jitter_p)
    grey = T.RandomGrayscale(p=a.grey_p)
    steps: list[Callable] = [T.RandomResizedCrop(side, scale=a.scale, ratio=a.ratio)]
    steps += [grey, jitter] if a.grey_first else [jitter, grey]
    if a.blur_p > 0:
        steps.append(T.RandomApply([_GaussianBlur(a.blur_sigma)], p=a.blur_p))
    if a.solarise_p > 0:
        steps.append(T.RandomSolarize(threshold=128, p=a.solarise_p))
    steps.append(T.RandomHorizontalFlip(p=a.flip_p))
    if a.vertical_flip_p > 0:
        steps.append(T.RandomVerticalFlip(p=a.vertical_flip_p))
    return T.Compose([*steps, T.ToTensor(), T.Normalize(a.mean, a.std)])


class _GaussianBlur:
    """Pillow's blur, as in the authors' code; several times faster than torchvision's on a PIL image."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self._sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self._sigma)))


class _Images(Dataset):
    """(view, …, position) of an image, or its DataError."""

    def __init__(self, index: ImageIndex, transform: Callable[[Image.Image], Tensor], views: int) -> None:
        self._index, self._transform, self._views = index, transform, views

    def __getitem__(self, i: int) -> tuple | DataError:
        try:
            image = _open(self._index, i)
            return *(self._transform(image) for _ in range(self._views)), i
        except DataError as error:
            return error


def _open(index: ImageIndex, i: int) -> Image.Image:
    """Pillow's own decoder for a common JPEG, as in most people's code; `ImageIndex.read` for everything else."""
    if index.is_encoded(i):
        try:
            with Image.open(io.BytesIO(index.read_bytes(i))) as image:
                if image.format == "JPEG" and image.mode in ("RGB", "L"):
                    return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError):
            pass  # `read` reports what is wrong with it, or replaces it
    return Image.fromarray(index.read(i))


def _collate(items: list) -> list | DataError:
    return next((item for item in items if isinstance(item, DataError)), None) or default_collate(items)
