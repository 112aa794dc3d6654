"""A small data set of JPEG and PNG files in the scratch folder, and its crops by the plainest means."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.augment.presets import Augmentation
from pipelines.data.headers import read_headers
from pipelines.data.index import ImageIndex
from pipelines.errors import DataError
from pipelines.plan.planner import Planner
from pipelines.views import BatchPlan

HEIGHT, WIDTH = 240, 320
JPEGS, PNGS = 48, 16
BATCH, SIDE = 32, 96
# Crops of 20 to 100 % of the area, as in training, and no colour.
CROPPED = Augmentation(name="cropped", scale=(0.2, 1.0), flip_p=0, jitter_p=0, grey_p=0, mean=(0, 0, 0), std=(1, 1, 1))
# The whole image whatever the random numbers, for the pipeline that draws its own.
_RATIO = WIDTH / HEIGHT
WHOLE = Augmentation(
    name="whole", scale=(1, 1), ratio=(_RATIO, _RATIO), flip_p=0, jitter_p=0, grey_p=0, mean=(0, 0, 0), std=(1, 1, 1)
)


def sample_images(scratch: str) -> ImageIndex:
    """The images in `scratch`/images, written by the first check that needs them."""
    folder = Path(scratch) / "images"
    if not folder.is_dir():
        partial = Path(tempfile.mkdtemp(dir=scratch))
        for i in range(JPEGS + PNGS):
            picture = Image.fromarray(_picture(i))
            if i < JPEGS:
                picture.save(partial / f"{i:02}.jpg", quality=90)
            else:
                picture.save(partial / f"{i:02}.png", compress_level=1)
        partial.rename(folder)
    paths = tuple(sorted(str(path) for path in folder.iterdir()))
    sizes, bad = read_headers(paths)
    if bad:
        raise DataError(bad[0][1])
    return ImageIndex("sample images", sizes, paths=paths)


def _picture(number: int) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8: waves of several frequencies, which compress like a photograph."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
    for period in (400, 120, 45, 17, 9):
        angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 3)
        wave = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)
        image += np.sin(wave[..., None] + phase) * period**0.3
    image = 127.5 + 127.5 * image / np.abs(image).max()
    return image.astype(np.uint8)


def planner(index: ImageIndex, augmentation: Augmentation) -> Planner:
    """The plans of a run on these images."""
    return Planner(index.sizes, seed=0, batch_size=BATCH, augmentation=augmentation, shuffle_keys=True)


def expected_crops(index: ImageIndex, plan: BatchPlan) -> Tensor:
    """(V, B, S, S, 3) float32 levels, not rounded: `ImageIndex.read`, then torch's antialiased resize of the box."""
    crops = torch.empty((*plan.boxes.shape[:2], SIDE, SIDE, 3))
    for row, image in enumerate(plan.indices.tolist()):
        pixels = torch.from_numpy(np.array(index.read(image))).permute(2, 0, 1)[None].float()
        for view, (top, left, height, width) in enumerate(plan.boxes[:, row].tolist()):
            region = pixels[:, :, top : top + height, left : left + width]
            resized = F.interpolate(region, (SIDE, SIDE), mode="bilinear", antialias=True)
            crops[view, row] = resized[0].permute(1, 2, 0)
    return crops
