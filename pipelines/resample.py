"""Crop and resize as matrix products: the antialiased bilinear filter of PIL and torchvision, for boxes of any size.

V views · C channels · H, W sides of the source in pixels · S side of a crop in pixels
"""

from __future__ import annotations

import torch
from torch import Tensor


def filter_matrix(start: Tensor, length: Tensor, source: int, side: int) -> Tensor:
    """Weights that resize the stretch [start, start + length) of an axis to `side` pixels.

    Output o looks at c = start + (o + 1/2) · s with s = length / side through a triangle of half-width max(s, 1),
    sampled at pixel centres, cut off at the ends of the stretch and normalised.

    start, length  (V,) whole numbers of pixels inside 0 to `source`.
    Returns (V, side, source) float32, rows summing to 1.
    """
    start, length = start.to(torch.float32)[:, None], length.to(torch.float32)[:, None]
    scale = length / side
    reach = scale.clamp_min(1.0)
    places = torch.arange(side, device=start.device, dtype=torch.float32) + 0.5
    pixels = torch.arange(source, device=start.device, dtype=torch.float32) + 0.5
    centre = (start + places * scale) / reach
    weights = ((pixels / reach)[:, None, :] - centre[:, :, None]).abs_().neg_().add_(1).clamp_min_(0)
    inside = (pixels > start) & (pixels < start + length)
    weights.mul_(inside[:, None, :])
    return weights.div_(weights.sum(-1, keepdim=True))


def crop_resize(images: Tensor, boxes: Tensor, out: Tensor) -> None:
    """Crops of equally sized images, in two batched matrix products a view, rounded to nearest.

    images  (B, H, C, W) uint8: with the channels between rows and columns, either product is one matrix a view
    boxes   (V, B, 4) top, left, height, width in pixels
    out     (V, B, S, C, S) uint8, written
    """
    count, height, channels, width = images.shape
    side = out.shape[-1]
    source = images.to(torch.float32).view(count, height * channels, width)
    for view in range(len(boxes)):
        top, left, box_h, box_w = boxes[view].unbind(-1)
        rows, columns = filter_matrix(top, box_h, height, side), filter_matrix(left, box_w, width, side)
        wide = torch.bmm(source, columns.mT).view(count, height, channels * side)
        crops = torch.bmm(rows, wide).view(count, side, channels, side)
        out[view] = crops.add_(0.5).clamp_(0, 255)  # the conversion to uint8 cuts off, so this rounds
