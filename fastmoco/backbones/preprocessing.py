"""Preprocessing of evaluation as a torchvision transform.

H, W height and width of an image · S side of the view in pixels · C channels, as many as mean and std have
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from fastmoco.backbones.description import Colour
from pipelines.augment.resize import resize_centre
from pipelines.data.decode import from_pil
from pipelines.plan.planner import eval_plans


class Preprocessing(nn.Module):
    """An image of any size → (C, S, S) float32: centre crop, antialiased resize, normalisation.

        S > 64   view = CenterCrop(S)(Resize(256/224 · S)(image)), antialiased, bilinear: that of ImageNet evaluation
        S ≤ 64   view = resize(centre square of min(H, W) pixels, S×S)
        y = (view as uint8 / 255 − mean) / std

    The view equals that of every evaluation in this project, and of torchvision, up to rounding by one grey level.

    Takes a PIL image of any mode (colours and EXIF orientation as in `pipelines.data.decode`), or uint8 tensors, of RGB
    for C = 3: (…, C, H, W) → (…, C, S, S), on any device. Raises ValueError for anything else.
    """

    def __init__(self, side: int, mean: Colour, std: Colour) -> None:
        super().__init__()
        self.side, self.mean, self.std = side, mean, std

    def forward(self, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Image.Image):
            pixels = np.array(from_pil(image, len(self.mean)))  # copied, since Pillow's memory is read-only
            image = torch.from_numpy(pixels).permute(2, 0, 1)
        if image.dtype != torch.uint8 or image.ndim < 3 or image.shape[-3] != len(self.mean) or 0 in image.shape:
            actual = f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
            colours = "uint8 RGB" if len(self.mean) == 3 else "uint8"
            expected = f"a PIL image or {colours} of shape (..., {len(self.mean)}, H, W)"
            raise ValueError(f"the image is {actual}, expected {expected}")
        plan = next(eval_plans(np.array([image.shape[-2:]], dtype=np.int32), np.arange(1), 1, self.side))
        if plan.shorter:
            crop = self._centre(image, plan.shorter)
        else:
            top, left, height, width = plan.boxes[0, 0].tolist()
            crop = functional.resized_crop(image, top, left, height, width, [self.side, self.side], antialias=True)
        values = functional.to_dtype(crop, torch.float32, scale=True)
        return functional.normalize(values, list(self.mean), list(self.std))

    def _centre(self, images: Tensor, shorter: int) -> Tensor:
        """(…, C, H, W) → (…, C, S, S) uint8."""
        flat = images.reshape(-1, *images.shape[-3:]).permute(0, 2, 3, 1)
        out = flat.new_empty((len(flat), self.side, self.side, flat.shape[-1]))
        for image, view in zip(flat, out, strict=True):
            resize_centre(image, shorter, view)
        return out.permute(0, 3, 1, 2).reshape(*images.shape[:-2], self.side, self.side)

    def extra_repr(self) -> str:
        return f"side={self.side}, mean={self.mean}, std={self.std}"
