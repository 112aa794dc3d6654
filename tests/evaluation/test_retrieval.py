"""Nearest neighbours by hand, who asks, and what the picture shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.evaluation.retrieval import draw, examples, nearest


def test_neighbours_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 4.0], [-1.0, 0.0]])
    similarity, rows = nearest(bank, torch.tensor([[10.0, 0.0]]), 3)
    assert rows.tolist() == [[0, 2, 1]]
    assert similarity[0].tolist() == pytest.approx([1.0, 0.6, 0.0])
    _, rows = nearest(bank, bank[[1]], 9, own=torch.tensor([1]))
    assert rows.tolist() == [[2, 0, 3]] or rows.tolist() == [[2, 3, 0]], "all but itself, the nearest first"


def test_the_classes_take_turns_to_ask() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 2)
    assert labels[examples(labels, 55, 6)].tolist() == [0, 1, 2, 0, 1, 2]
    assert len(set(examples(labels, 55, 10).tolist())) == 10
    many = np.arange(300) % 100
    asked = many[examples(many, 300, 10)]
    assert asked.tolist() == list(range(0, 100, 10)), "from all over a long list of classes"
    assert examples(None, 100, 4).tolist() == [0, 25, 50, 75]
    assert examples(None, 2, 10).tolist() == [0, 1]


@pytest.mark.parametrize("side", [8, 32, 224])
def test_frames_are_green_where_the_classes_agree(tmp_path: Path, side: int) -> None:
    asked = torch.full((2, side, side, 3), 128, dtype=torch.uint8)
    found = torch.full((2, 3, side, side, 3), 128, dtype=torch.uint8)
    names = ("a cat", "a class with a very long name that cannot fit below its picture \x1b[31m")
    similarity = [[1.0, 0.9, 0.8]] * 2

    def frames(own: list[int] | None, theirs: list[list[int]] | None) -> tuple[int, int]:
        draw(asked, found, similarity, own, theirs, names, tmp_path / "r.png")
        with Image.open(tmp_path / "r.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        return tuple(int((pixels == colour).all(-1).sum()) for colour in ((46, 125, 79), (198, 74, 58)))  # type: ignore

    green, red = frames([0, 1], [[0, 0, 1], [1, 1, 0]])
    assert green == 2 * red > 0
    assert frames([0, 1], [[0, 0, 0], [1, 1, 1]]) == (green * 3 // 2, 0)
    assert frames(None, None) == (0, 0)
