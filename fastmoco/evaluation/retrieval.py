"""Retrieval picture: query images beside their nearest neighbours in feature space.

M queries · N images of the bank · D features · S side of a view in pixels
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from fastmoco.evaluation.knn import top_k_neighbours
from fastmoco.evaluation.plots import replace_unprintable, shortened
from fastmoco.run.png import save_image

_MIN_SIDE_PX, _MAX_SIDE_PX = 72, 112  # of a drawn view
_FRAME_PX, _PADDING_PX, _LINE_PX, _HEADER_PX = 4, 6, 14, 24
_TEXT, _WHITE = (90, 90, 90), (255, 255, 255)
_SAME_CLASS, _OTHER_CLASS, _UNKNOWN_CLASS = (46, 125, 79), (198, 74, 58), (190, 190, 190)


@torch.no_grad()
def retrieve(bank: Tensor, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosine similarities and bank rows of the k nearest neighbours, (M, k) each, the nearest first.

    bank (N, D) and queries (M, D); exclude (M,) the row of each query if the bank contains the queries themselves.
    """
    return top_k_neighbours(F.normalize(bank.float(), dim=1), queries.float(), k, exclude)


def choose_queries(labels: np.ndarray | None, count: int, rows: int) -> np.ndarray:
    """Positions (rows,) of the queries to draw, of `count`: classes interleaved; without labels, evenly spaced."""
    rows = min(rows, count)
    if labels is None:
        return np.arange(rows) * count // rows
    _, classes = np.unique(labels, return_inverse=True)
    num_classes = classes.max() + 1
    occurrence = np.zeros(count, dtype=np.int64)  # 0 for the first image of a class, 1 for its second
    for label in range(num_classes):
        members = np.flatnonzero(classes == label)
        occurrence[members] = np.arange(len(members))
    order = np.lexsort((classes, occurrence))
    if rows < num_classes:  # spread over all classes rather than the first ones
        return np.sort(order[np.arange(rows) * num_classes // rows])
    return order[:rows]


def draw(
    queries: Tensor,
    neighbours: Tensor,
    similarity: Sequence[Sequence[float]],
    query_labels: Sequence[int] | None,
    neighbour_labels: Sequence[Sequence[int]] | None,
    names: Sequence[str],
    path: Path,
    files: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
) -> None:
    """Write a PNG with one row per query: the query, then its neighbours, framed green where the classes agree.

    queries (M, S, S, 3) uint8, neighbours (M, k, S, S, 3) uint8, similarity (M, k), labels (M,) and (M, k). Without
    labels, frames are grey, and the names of the `files`, (M,) and (M, k), stand for those of classes. Raises OSError
    if writing fails.
    """
    count, k = neighbours.shape[:2]
    digits = decimals(similarity)
    cells = []
    for row in range(count):
        own = None if query_labels is None else query_labels[row]
        own_name = names[own] if own is not None else files[0][row] if files is not None else ""
        cells.append(_cell(queries[row], _WHITE, (own_name, "")))
        for column in range(k):
            label = None if neighbour_labels is None else neighbour_labels[row][column]
            frame = _UNKNOWN_CLASS if label is None or own is None else _SAME_CLASS if label == own else _OTHER_CLASS
            name = names[label] if label is not None else files[1][row][column] if files is not None else ""
            caption = f"{similarity[row][column]:.{digits}f}", name
            cells.append(_cell(neighbours[row, column], frame, caption))
    grid = make_grid(cells, nrow=1 + k, padding=_PADDING_PX, pad_value=255)
    sheet = to_pil_image(F.pad(grid, (0, 0, _HEADER_PX, 0), value=255))
    pen, font, cell_px = ImageDraw.Draw(sheet), ImageFont.load_default(13), cells[0].shape[-1]
    title = "nearest neighbours, cosine similarity" + ("" if neighbour_labels is None else "; green: same class")
    pen.text((_PADDING_PX + _FRAME_PX, _PADDING_PX), "query", fill=_TEXT, font=font)
    pen.text((2 * _PADDING_PX + cell_px, _PADDING_PX), title, fill=_TEXT, font=font)
    save_image(sheet, path)


def decimals(similarity: Sequence[Sequence[float]]) -> int:
    """Decimals, two to five, with which at least half of the differences between two neighbours in a row show."""
    pairs = [pair for row in similarity for pair in itertools.pairwise(row)]
    for digits in range(2, 5):
        if 2 * sum(f"{a:.{digits}f}" != f"{b:.{digits}f}" for a, b in pairs) >= len(pairs):
            return digits
    return 5


def _cell(pixels: Tensor, frame: tuple[int, int, int], caption: Sequence[str]) -> Tensor:
    """A framed view (S, S, 3) with as much of each line of the caption as fits below, as (3, height, width) uint8."""
    side = _drawn_side(len(pixels))
    method = Image.Resampling.NEAREST if side > len(pixels) else Image.Resampling.LANCZOS
    framed = ImageOps.expand(Image.fromarray(pixels.numpy()).resize((side, side), method), _FRAME_PX, frame)
    cell = ImageOps.expand(framed, (0, 0, 0, _LINE_PX * len(caption) + 4), _WHITE)
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default(11)
    for number, line in enumerate(caption):
        text = replace_unprintable(line)
        kept = len(text)
        while kept and font.getlength(shortened(text, kept)) > cell.width:
            kept -= 1
        pen.text((0, framed.height + 2 + number * _LINE_PX), shortened(text, kept), fill=_TEXT, font=font)
    return pil_to_tensor(cell)


def _drawn_side(side: int) -> int:
    """Small views are enlarged by a whole factor, to keep their pixels sharp; large ones are reduced."""
    return side * -(-_MIN_SIDE_PX // side) if side < _MIN_SIDE_PX else min(side, _MAX_SIDE_PX)
