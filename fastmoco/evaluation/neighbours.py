"""Nearest neighbours and near-duplicates among the features of many images, in blocks: never N² similarities at once.

N images · D length of a feature · k neighbours · A rows and B columns of a block
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fastmoco.evaluation.budget import budget_bytes
from fastmoco.progress import Counted

_BLOCK_BYTES = 64 * 2**20  # of similarities
_ROUNDING = 1e-6
_MAX_PAIRS = 4_000_000  # joined at a time


class Block(NamedTuple):
    """Cosine similarities (A, B) of the images from `row` on to those from `column` on."""

    row: int
    column: int
    similarity: Tensor


@torch.no_grad()
def similarity_blocks(features: np.ndarray, device: torch.device, bank_rows: int | None = None) -> Iterator[Block]:
    """All cosine similarities of features (N, D) float32, which may be a mapped file, in blocks on a device.

    bank_rows  columns that are on the device at a time; None: as many as fit in half of its free memory
    """
    count, dim = features.shape
    bank_rows = bank_rows or max(1, budget_bytes(device) // (8 * dim))
    for column in range(0, count, bank_rows):
        bank = _normalised(features[column : column + bank_rows], device)
        rows = max(1, _BLOCK_BYTES // (4 * len(bank)))
        for row in range(0, count, rows):
            yield Block(row, column, _normalised(features[row : row + rows], device) @ bank.T)


def _normalised(features: np.ndarray, device: torch.device) -> Tensor:
    return F.normalize(torch.from_numpy(np.array(features)).to(device), dim=1)


@torch.no_grad()
def nearest(
    features: np.ndarray, k: int, device: torch.device, console: Console, bank_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, k) int64 and cosine similarities (N, k) float32 of the min(k, N - 1) nearest other images of each.

    The nearest is first; which of several at the same distance are among the k is unspecified. A feature of zeros has
    similarity 0 to all. Holds 12 k bytes for each image, beside `similarity_blocks`.
    """
    count = len(features)
    k = min(k, count - 1)
    similarity, rows = np.full((count, k), -np.inf, dtype=np.float32), np.zeros((count, k), dtype=np.int64)
    with Counted(console, "nearest neighbours", count**2, "pairs") as progress:
        for first, column, block in similarity_blocks(features, device, bank_rows):
            _leave_out_self(first, column, block)
            values, near = block.topk(min(k, block.shape[1]), dim=1)
            part = slice(first, first + len(block))
            values = torch.cat([torch.from_numpy(similarity[part]).to(device), values], dim=1)
            near = torch.cat([torch.from_numpy(rows[part]).to(device), near + column], dim=1)
            best, order = values.topk(k, dim=1)
            similarity[part] = best.cpu().numpy()
            rows[part] = near.gather(1, order).cpu().numpy()
            progress.advance(block.numel())
    return rows, similarity.clip(-1, 1)


def _leave_out_self(row: int, column: int, block: Tensor) -> None:
    """Set the similarity of every image to itself to minus infinity."""
    begin, end = max(row, column), min(row + block.shape[0], column + block.shape[1])
    if begin < end:
        own = torch.arange(begin, end, device=block.device)
        block[own - row, own - column] = -torch.inf


@torch.no_grad()
def duplicate_groups(
    features: np.ndarray, cosine: float, device: torch.device, console: Console, bank_rows: int | None = None
) -> list[np.ndarray]:
    """Groups of images joined by pairs of at least this cosine similarity, as ascending rows; the largest group first.

    Two images of a group need not be similar to each other, only to others in between. Groups have two images or more.
    The similarity of two equal features, 1 up to rounding, counts as 1.
    """
    count = len(features)
    group = np.arange(count)  # of each image; those of a group are joined further as pairs are found
    pairs: list[np.ndarray] = []
    with Counted(console, "near-duplicates", count**2, "pairs") as progress:
        for row, column, block in similarity_blocks(features, device, bank_rows):
            found = (block >= cosine - _ROUNDING).nonzero().cpu().numpy() + np.array([row, column])
            pairs.append(found[found[:, 0] < found[:, 1]])
            if sum(map(len, pairs)) > _MAX_PAIRS:
                group, pairs = _joined(group, pairs), []
            progress.advance(block.numel())
    group = _joined(group, pairs)
    order = np.argsort(group, kind="stable")
    _, sizes = np.unique(group, return_counts=True)
    groups = [rows for rows in np.split(order, np.cumsum(sizes)[:-1]) if len(rows) > 1]
    return sorted(groups, key=lambda rows: (-len(rows), rows[0]))


def _joined(group: np.ndarray, pairs: list[np.ndarray]) -> np.ndarray:
    """The group of each image after the images of these pairs are joined."""
    if not pairs:
        return group
    a, b = group[np.concatenate(pairs)].T
    edges = coo_array((np.ones(len(a)), (a, b)), shape=(len(group), len(group)))
    return connected_components(edges, directed=False)[1][group]
