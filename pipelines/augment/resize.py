"""Crop and resize of decoded images of any size on a CPU, one crop at a time.

V views · B images · H, W sides of an image · S side of a crop
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.cpu_threads import parallel_for


def resize_boxes(images: Sequence[Tensor], boxes: np.ndarray, out: Tensor) -> None:
    """`resize_box` for every box, on all cores. B images (H, W, 3), boxes (V, B, 4), out (V, B, S, S, 3) uint8."""

    def crop(row: int) -> None:
        for view, box in enumerate(boxes[:, row].tolist()):
            resize_box(images[row], box, out[view, row])

    parallel_for(crop, range(len(images)))


def resize_box(pixels: Tensor, box: list[int], out: Tensor) -> None:
    """One antialiased bilinear crop on a CPU: (H, W, 3) uint8 and (top, left, height, width) into (S, S, 3) uint8.

    Like `torch.nn.functional.interpolate(antialias=True)`, but written straight to `out`: a third of the time at 224
    pixels, because the result is neither converted to planes and back nor copied.
    """
    top, left, height, width = box
    region = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bilinear2d_aa.out(
        region, list(out.shape[:2]), False, None, None, out=out.permute(2, 0, 1)[None]
    )
