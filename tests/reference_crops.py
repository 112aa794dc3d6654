"""Crop and antialiased resize in float64: the reference for the pixels of every backend."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.augment.resample import crop_resize
from pipelines.data.index import ImageIndex
from pipelines.views import BatchPlan


def weights(start: int, length: int, source: int, side: int) -> np.ndarray:
    """(side, source) float64: a triangle of half-width max(1, scale) around each output pixel's centre, normalised."""
    scale = length / side
    centres = start + (np.arange(side)[:, None] + 0.5) * scale
    tent = np.maximum(0, 1 - np.abs(np.arange(source)[None] + 0.5 - centres) / max(scale, 1))
    tent[:, :start] = tent[:, start + length :] = 0
    return tent / tent.sum(axis=1, keepdims=True)


def reference(pixels: np.ndarray, box: np.ndarray, side: int) -> np.ndarray:
    """(S, S, 3) float64, not rounded, of pixels (H, W, 3) and a box of top, left, height, width."""
    top, left, height, width = box.tolist()
    rows, columns = weights(top, height, pixels.shape[0], side), weights(left, width, pixels.shape[1], side)
    return np.einsum("ij,jkc,lk->ilc", rows, pixels.astype(np.float64), columns, optimize=True)


def errors(index: ImageIndex, plan: BatchPlan, images: torch.Tensor) -> np.ndarray:
    """(V, B, S, S, 3): absolute difference of a plan's crops from float64 crops of the index's pixels."""
    side = images.shape[2]
    crops = [[reference(index.read(i), box, side) for i, box in zip(plan.indices, b, strict=True)] for b in plan.boxes]
    return np.abs(images.cpu().numpy() - np.array(crops))


def batched_crops(images: torch.Tensor, boxes: torch.Tensor, side: int) -> torch.Tensor:
    """`crop_resize` into memory with other content: (B, H, C, W) and (V, B, 4) to (V, B, S, S, C)."""
    out = torch.full((*boxes.shape[:2], side, images.shape[2], side), 77, dtype=torch.uint8)
    crop_resize(images, boxes, out)
    return out.permute(0, 1, 2, 4, 3)
