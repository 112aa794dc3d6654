"""Crop and resize as matrix products: the antialiased bilinear filter of PIL and torchvision, for boxes of any size.

V views · C channels · H, W sides of the source in pixels · S side of a crop in pixels
"""

from __future__ import annotations

import torch
from torch import Tensor


def filter_matrix(start: Tensor, length: Tensor, source: int, side: int, *, beyond: bool = False) -> Tensor:
    """Weights that resize the interval [start, start + length) of an axis to `side` pixels.

    Output o has a triangle filter of half-width max(s, 1) around c = start + (o + 1/2) · s, where s = length / side.
    The filter is sampled at pixel centres, truncated at the ends of the interval (with `beyond`: of the axis), and
    normalised.

    start, length  (V,) pixels inside 0 to `source`: whole numbers, or with `beyond` any
    Returns (V, side, source) float32, rows summing to 1.
    """
    start, length = start.to(torch.float32)[:, None], length.to(torch.float32)[:, None]
    scale = length / side
    reach = scale.clamp_min(1.0)
    outputs = torch.arange(side, device=start.device, dtype=torch.float32) + 0.5
    pixels = torch.arange(source, device=start.device, dtype=torch.float32) + 0.5
    centre = (start + outputs * scale) / reach
    if not beyond:
        inside = (pixels > start) & (pixels < start + length)
        pixels = torch.where(inside, pixels, torch.inf)  # outside of every triangle
    pixels = pixels / reach
    weights = (pixels[:, None, :] - centre[:, :, None]).abs_().neg_().add_(1).clamp_min_(0)
    return weights.div_(weights.sum(-1, keepdim=True))


def crop_resize(images: Tensor, boxes: Tensor, out: Tensor, *, beyond: bool = False) -> None:
    """Crops of equally sized images, in two batched matrix products for all views, rounded to nearest.

    images  (B, H, C, W) uint8: with channels between rows and columns, each product is one matrix per image
    boxes   (V, B, 4) top, left, height, width in pixels
    out     (V, B, S, C, S) uint8, written
    beyond  as of `filter_matrix`
    """
    count, height, channels, width = images.shape
    views, side = len(boxes), out.shape[-1]
    top, left, box_h, box_w = boxes.transpose(0, 1).reshape(-1, 4).unbind(-1)  # (B·V,), views of an image adjacent
    rows = filter_matrix(top, box_h, height, side, beyond=beyond)
    columns = filter_matrix(left, box_w, width, side, beyond=beyond)
    # Weights are non-negative and sum to 1: the 0.5 added here arrives unchanged, values stay in 0 to 255.5, and the
    # conversion to uint8 truncates, which together rounds to nearest.
    source = images.to(torch.float32).add_(0.5).view(count, height, channels * width)
    tall = torch.bmm(rows.view(count, views * side, height), source).view(count * views, side * channels, width)
    crops = torch.bmm(tall, columns.mT).view(count, views, side, channels, side)
    out.copy_(crops.transpose(0, 1))
