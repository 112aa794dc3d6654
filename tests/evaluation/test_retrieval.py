"""Nearest neighbours against hand-computed values, choice of queries, and the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.evaluation.retrieval import choose_queries, draw, retrieve


def test_hand_computed_neighbours() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 4.0], [-1.0, 0.0]])
    similarity, rows = retrieve(bank, torch.tensor([[10.0, 0.0]]), 3)
    assert rows.tolist() == [[0, 2, 1]]
    assert similarity[0].tolist() == pytest.approx([1.0, 0.6, 0.0])
    _, rows = retrieve(bank, bank[[1]], 9, exclude=torch.tensor([1]))
    assert rows.tolist() == [[2, 0, 3]] or rows.tolist() == [[2, 3, 0]], "all but itself, the nearest first"


def test_queries_are_interleaved_by_class() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 2)
    assert labels[choose_queries(labels, 55, 6)].tolist() == [0, 1, 2, 0, 1, 2]
    assert len(set(choose_queries(labels, 55, 10).tolist())) == 10
    many = np.arange(300) % 100
    chosen = many[choose_queries(many, 300, 10)]
    assert chosen.tolist() == list(range(0, 100, 10)), "spread over all classes"
    assert choose_queries(None, 100, 4).tolist() == [0, 25, 50, 75]
    assert choose_queries(None, 2, 10).tolist() == [0, 1]


@pytest.mark.parametrize("side", [8, 32, 224])
def test_frames_are_green_where_the_classes_agree(tmp_path: Path, side: int) -> None:
    queries = torch.full((2, side, side, 3), 128, dtype=torch.uint8)
    neighbours = torch.full((2, 3, side, side, 3), 128, dtype=torch.uint8)
    names = ("a cat", "a class with a very long name that cannot fit below its picture \x1b[31m")
    similarity = [[1.0, 0.9, 0.8]] * 2

    def frames(query_labels: list[int] | None, neighbour_labels: list[list[int]] | None) -> tuple[int, int]:
        draw(queries, neighbours, similarity, query_labels, neighbour_labels, names, tmp_path / "r.png")
        with Image.open(tmp_path / "r.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        return tuple(int((pixels == colour).all(-1).sum()) for colour in ((46, 125, 79), (198, 74, 58)))  # type: ignore

    green, red = frames([0, 1], [[0, 0, 1], [1, 1, 0]])
    assert green == 2 * red > 0
    assert frames([0, 1], [[0, 0, 0], [1, 1, 1]]) == (green * 3 // 2, 0)
    assert frames(None, None) == (0, 0)
