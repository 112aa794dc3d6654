"""Preprocessing of evaluation as a torchvision transform.

H, W height and width of an image · S side of the view in pixels
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from pipelines.data.decode import exif_orientation, rgb, upright
from pipelines.plan.planner import eval_plans

Colour = tuple[float, float, float]


class Preprocessing(nn.Module):
    """An image of any size → (3, S, S) float32: centre crop, antialiased resize, normalisation.

        crop = image[centre square of rint(f · min(H, W)) pixels]           f = 1 up to S = 64, else 224/256
        y = (resize(crop, S×S, bilinear, antialiased, rounded to uint8) / 255 − mean) / std

    The image is cropped before it is resized, as in `pipelines.plan.planner.eval_plans`, so that pixels outside of the
    crop have no influence. The view equals that of every evaluation in this project up to rounding by one grey level.

    Takes a PIL image of any mode (colours and EXIF orientation as in `pipelines.data.decode`), or uint8 RGB tensors
    (…, 3, H, W) → (…, 3, S, S), on any device. Raises ValueError for anything else.
    """

    def __init__(self, side: int, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.side, self.mean, self.std = side, mean, std

    def forward(self, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Image.Image):
            pixels = np.array(
                upright(rgb(image), exif_orientation(image))
            )  # copied, since Pillow's memory is read-only
            image = torch.from_numpy(pixels).permute(2, 0, 1)
        if image.dtype != torch.uint8 or image.ndim < 3 or image.shape[-3] != 3 or 0 in image.shape:
            actual = f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
            raise ValueError(f"the image is {actual}, expected a PIL image or uint8 RGB of shape (..., 3, H, W)")
        top, left, height, width = self._box(*image.shape[-2:])
        crop = functional.resized_crop(image, top, left, height, width, [self.side, self.side], antialias=True)
        values = functional.to_dtype(crop, torch.float32, scale=True)
        return functional.normalize(values, list(self.mean), list(self.std))

    def _box(self, height: int, width: int) -> list[int]:
        plan = next(eval_plans(np.array([[height, width]], dtype=np.int32), np.arange(1), 1, self.side))
        return plan.boxes[0, 0].tolist()

    def extra_repr(self) -> str:
        return f"side={self.side}, mean={self.mean}, std={self.std}"
