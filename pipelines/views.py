"""The vocabulary every pipeline shares.

B images a batch · S side of a crop in pixels · a pair is both views of one image, view 0 the query, view 1 the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which images a step sees, where they are cropped and how they are coloured: a pure function of (seed, step).

    There are V = 2 views in training, and V = 1 in evaluation.

    step       global step, from 0
    epoch      epoch of that step, from 0
    indices    (B,) int64, positions in the ImageIndex
    boxes      (2, B, 4) int32, top, left, height, width in pixels of
                the whole, upright image
    params     (2, B, P) float32, one row of `augment.COLUMNS` for every view
    key_order  (B,) int64, row r of the key batch is the key view of image `indices[key_order[r]]`
    """

    step: int
    epoch: int
    indices: np.ndarray
    boxes: np.ndarray
    params: np.ndarray
    key_order: np.ndarray


@dataclass(frozen=True, slots=True)
class Crops:
    """The resized regions of a plan, before colour and flip: (V, B, S, S, 3) uint8, all views in the plan's order."""

    images: Tensor
    plan: BatchPlan


class CropSource(Protocol):
    """The seam between backends: plans in, uint8 crops out on the device, in the same order, none skipped.

    `crops` may be called again while an earlier iterator is still in use. Raises DataError for a bad image.
    """

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Views:
    """Both views of a batch, ready for the encoders.

    query      (B, 3, S, S) channels-last, normalised, in the training dtype
    key        (B, 3, S, S) likewise; its rows are shuffled: row r belongs to the query in row key_order[r]
    key_order  (B,) int64 permutation on the device
    index      (B,) int64 positions in the ImageIndex, in the order of `query`
    """

    query: Tensor
    key: Tensor
    key_order: Tensor
    index: Tensor
