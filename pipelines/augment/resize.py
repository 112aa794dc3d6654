"""Crop and resize of decoded images of any size, one crop at a time.

V views · B images · H, W sides of an image · S side of a crop
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.augment.resample import crop_resize
from pipelines.cpu_threads import parallel_for
from pipelines.transfer import to_device

_MAX_ASPECT = 4  # of an image that is resized as a whole


def resize_boxes(images: Sequence[Tensor], boxes: np.ndarray, out: Tensor) -> None:
    """`resize_box` for every box, on all cores. B images (H, W, C), boxes (V, B, 4), out (V, B, S, S, C) uint8."""

    def crop(row: int) -> None:
        for view, box in enumerate(boxes[:, row].tolist()):
            resize_box(images[row], box, out[view, row])

    parallel_for(crop, range(len(images)))


def resize_box(pixels: Tensor, box: list[int], out: Tensor) -> None:
    """One antialiased bilinear crop on a CPU: (H, W, C) uint8 and (top, left, height, width) into (S, S, C) uint8.

    Like `torch.nn.functional.interpolate(antialias=True)`, but written straight to `out`: a third of the time at 224
    pixels, because the result is neither converted to planes and back nor copied.
    """
    top, left, height, width = box
    region = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bilinear2d_aa.out(
        region, list(out.shape[:2]), False, None, None, out=out.permute(2, 0, 1)[None]
    )


class CentreView(NamedTuple):
    """Which part of an image its standard view of evaluation is made of.

    rows, columns  of the image that the filter reaches
    box            (4,) float32 top, left, height, width of the view in that part, in pixels
    resized        height and width of the whole image where its shorter side is `shorter`
    corner         top and left of the view in it
    """

    rows: slice
    columns: slice
    box: np.ndarray
    resized: tuple[int, int]
    corner: tuple[int, int]


def centre_view(height: int, width: int, shorter: int, side: int) -> CentreView:
    """That of an image of this size; as torchvision's Resize and CenterCrop round."""
    longer = int(shorter * max(height, width) / min(height, width))
    resized = (shorter, longer) if height <= width else (longer, shorter)
    corner = (round((resized[0] - side) / 2), round((resized[1] - side) / 2))
    parts, starts, lengths = [], [], []
    for start, length, source in zip(corner, resized, (height, width), strict=True):
        scale = source / length
        first = max(0, math.floor(start * scale - max(scale, 1)))
        parts.append(slice(first, min(source, math.ceil((start + side) * scale + max(scale, 1)))))
        starts.append(start * scale - first)
        lengths.append(side * scale)
    rows, columns = parts
    return CentreView(rows, columns, np.array([*starts, *lengths], dtype=np.float32), resized, corner)


def resize_centre(pixels: Tensor, shorter: int, out: Tensor) -> None:
    """The standard view of evaluation: (H, W, C) uint8 on any device into (S, S, C) uint8 on the same.

        torchvision.transforms.v2.Compose([Resize(shorter, antialias=True), CenterCrop(S)]),  S ≤ shorter

    up to one grey level. Only the pixels that are seen are resized on a GPU, and of images more than four times as long
    as they are wide.
    """
    (height, width), side = pixels.shape[:2], len(out)
    view = centre_view(height, width, shorter, side)
    if pixels.device.type != "cpu" or max(view.resized) > _MAX_ASPECT * shorter:
        resize_part(pixels, view, to_device(view.box, pixels.device), out)
        return
    image, (top, left) = pixels.permute(2, 0, 1)[None], view.corner
    whole = torch.ops.aten._upsample_bilinear2d_aa(image, list(view.resized), False, None, None)[0].permute(1, 2, 0)
    out.copy_(whole[top : top + side, left : left + side])


def resize_centres(images: Sequence[Tensor], shorter: int, out: Tensor) -> None:
    """`resize_centre` of B images (H, W, C) on a GPU, with one copy from the host for all of them.

    out  (B, S, S, C) uint8 on the device of the images
    """
    views = [centre_view(image.shape[0], image.shape[1], shorter, out.shape[1]) for image in images]
    boxes = to_device(np.stack([view.box for view in views]), out.device)
    for row, (image, view) in enumerate(zip(images, views, strict=True)):
        resize_part(image, view, boxes[row], out[row])


def resize_part(pixels: Tensor, view: CentreView, box: Tensor, out: Tensor) -> None:
    """Resize what is seen of an image, by two matrix products; `box` is the view's, on the device of the image."""
    seen = pixels[view.rows, view.columns].permute(0, 2, 1)[None].contiguous()
    crop_resize(seen, box.view(1, 1, 4), out.permute(0, 2, 1)[None, None], beyond=True)
