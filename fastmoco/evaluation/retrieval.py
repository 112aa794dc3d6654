"""A picture of nearest neighbours: images that ask, and the images whose features are most like theirs.

M queries · N images of the bank · D features · S side of a view in pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_TILE_PX = (72, 112)  # a view is drawn no smaller and no larger
_FRAME_PX, _GUTTER_PX, _GAP_PX, _MARGIN_PX, _CAPTION_PX, _HEADER_PX = 4, 6, 20, 14, 18, 24
_INK, _PAPER = (90, 90, 90), (255, 255, 255)
_SAME, _OTHER, _UNKNOWN = (46, 125, 79), (198, 74, 58), (190, 190, 190)


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, count: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosine similarities (M, count) and rows in the bank (M, count) of the nearest images, the nearest first.

        similarity = normalize(queries) @ normalize(bank).T

    bank (N, D), queries (M, D); own (M,), where a query is itself in the bank: it is not among its neighbours.
    """
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T
    if own is not None:
        similarity.scatter_(1, own[:, None], -math.inf)
    return similarity.topk(min(count, len(bank) - (own is not None)), dim=1)


def examples(labels: np.ndarray | None, count: int, rows: int) -> np.ndarray:
    """(rows,) positions of the images that ask, of `count`: the classes take turns; without labels, evenly spaced."""
    rows = min(rows, count)
    if labels is None:
        return np.arange(rows) * count // rows
    _, rank = np.unique(labels, return_inverse=True)
    turn = np.zeros(count, dtype=np.int64)  # 0 for the first image of a class, 1 for its second
    for label in range(rank.max() + 1):
        members = np.flatnonzero(rank == label)
        turn[members] = np.arange(len(members))
    classes = rank.max() + 1
    order = np.lexsort((rank, turn))
    if rows < classes:  # not the first classes of a long list, but some of all
        return np.sort(order[np.arange(rows) * classes // rows])
    return order[:rows]


def draw(
    asked: Tensor,
    found: Tensor,
    similarity: Sequence[Sequence[float]],
    asked_labels: Sequence[int] | None,
    found_labels: Sequence[Sequence[int]] | None,
    names: Sequence[str],
    path: Path,
) -> None:
    """A PNG with a row for every query, at the left, and its neighbours; framed green where the classes agree.

    asked (M, S, S, 3) uint8, found (M, k, S, S, 3) uint8, similarity and labels alike; without labels frames are grey.
    Raises OSError on writing.
    """
    side = _drawn_side(asked.shape[1])
    cell, font, small = side + 2 * _FRAME_PX, ImageFont.load_default(13), ImageFont.load_default(11)
    rows, columns = found.shape[:2]
    width = 2 * _MARGIN_PX + cell + _GAP_PX + columns * (cell + _GUTTER_PX) - _GUTTER_PX
    height = _MARGIN_PX + _HEADER_PX + rows * (cell + _CAPTION_PX + _GUTTER_PX) + _MARGIN_PX - _GUTTER_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN_PX, _MARGIN_PX), "image", fill=_INK, font=font)
    neighbours = "most similar features, cosine"
    if found_labels is not None:
        neighbours += "; green: of its class"
    pen.text((_MARGIN_PX + cell + _GAP_PX, _MARGIN_PX), neighbours, fill=_INK, font=font)
    for row in range(rows):
        top = _MARGIN_PX + _HEADER_PX + row * (cell + _CAPTION_PX + _GUTTER_PX)
        own = None if asked_labels is None else asked_labels[row]
        caption = "" if own is None else names[own]
        _cell(sheet, pen, asked[row], (_MARGIN_PX, top), side, _PAPER, caption, small)
        for column in range(columns):
            left = _MARGIN_PX + cell + _GAP_PX + column * (cell + _GUTTER_PX)
            label = None if found_labels is None else found_labels[row][column]
            frame = _UNKNOWN if label is None or own is None else _SAME if label == own else _OTHER
            caption = f"{similarity[row][column]:.2f}" + ("" if label is None else f" {names[label]}")
            _cell(sheet, pen, found[row, column], (left, top), side, frame, caption, small)
    sheet.save(path, "PNG")


def _cell(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    pixels: Tensor,
    corner: tuple[int, int],
    side: int,
    frame: tuple[int, int, int],
    caption: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """An image in its frame, and as much of the caption as fits below."""
    left, top = corner
    pen.rectangle((left, top, left + side + 2 * _FRAME_PX - 1, top + side + 2 * _FRAME_PX - 1), fill=frame)
    image = Image.fromarray(pixels.numpy())
    if image.width != side:
        method = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
        image = image.resize((side, side), method)
    sheet.paste(image, (left + _FRAME_PX, top + _FRAME_PX))
    text = "".join(letter if letter.isprintable() else "?" for letter in caption)
    while text and font.getlength(text) > side + 2 * _FRAME_PX:
        text = text[:-1]
    pen.text((left, top + side + 2 * _FRAME_PX + 2), text, fill=_INK, font=font)


def _drawn_side(side: int) -> int:
    """Small views enlarged by a whole factor, their pixels staying sharp squares; large ones reduced."""
    smallest, largest = _TILE_PX
    return side * -(-smallest // side) if side < smallest else min(side, largest)
