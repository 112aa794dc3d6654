"""Data types and interfaces that all pipelines share.

B images per batch · R ranks that share it · S side of a crop in pixels · C channels
A pair is both views of one image, view 0 the query, view 1 the key.
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

    V = 2 views in training, V = 1 in evaluation. With several ranks, each has its share of the rows of the query batch
    and of the key batch. If keys are shuffled over all ranks, these rows are different images: then V = 1 and n = 2B/R,
    the images of the rank's queries, then those of its keys.

    step       global step, from 0
    epoch      epoch of that step, from 0
    indices    (n,) int64, positions in the ImageIndex; n = B on one rank
    boxes      (V, n, 4) int32, top, left, height, width in pixels of the whole, upright image
    params     (V, n, P) float32, one row of parameters for every view, columns as in `augment.params.Column`
    key_order  (B,) int64, over all ranks: row r of the key batch is the key view of the image in row key_order[r] of
               the query batch
    shorter    if above 0, the boxes are not cropped: images are resized until their shorter side has so many pixels,
               and cropped in the centre (`augment.resize.resize_centre`); V = 1
    """

    step: int
    epoch: int
    indices: np.ndarray
    boxes: np.ndarray
    params: np.ndarray
    key_order: np.ndarray
    shorter: int = 0

    @property
    def rows(self) -> np.ndarray:
        """(2B/R,) positions in the flattened V·n views of this rank's query batch, then of its key batch."""
        views, count = self.boxes.shape[:2]
        rows = np.arange(views * count)
        if views == 2 and count == len(self.key_order):  # one rank: its keys are shuffled here
            rows[count:] = count + self.key_order
        return rows


@dataclass(frozen=True, slots=True)
class Crops:
    """Resized crops of a plan, before colour and flip: (V, B, S, S, C) uint8, in the plan's order."""

    images: Tensor
    plan: BatchPlan


class CropSource(Protocol):
    """Interface of a backend: plans in, uint8 crops on the device out, in the same order, none skipped.

    `crops` may be called again while an earlier iterator is still in use. Raises DataError for a bad image.
    """

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Views:
    """Both views of a batch, or of a rank's share of it: the input of the encoders.

    On CUDA the next batch but one of the iterator overwrites it: before another batch is asked for, all work on it must
    be enqueued in the current stream, and what is to be kept must be copied.

    query      (B/R, C, S, S) channels-last, normalised, in the training dtype
    key        (B/R, C, S, S) likewise, rows shuffled: in the key batch concatenated over ranks, row r belongs to the
               query in row key_order[r]
    key_order  (B,) int64 permutation on the device
    index      (B/R,) int64 positions in the ImageIndex, in the order of `query`
    """

    query: Tensor
    key: Tensor
    key_order: Tensor
    index: Tensor
