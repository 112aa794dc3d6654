"""Nearest neighbours against hand-computed values, choice of queries, and the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fastmoco.evaluation.retrieval import choose_queries, decimals, draw, retrieve


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


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [
        ([[0.91, 0.85, 0.4]], 2),
        ([[0.9981, 0.9979, 0.9954], [0.9991, 0.9982, 0.9961]], 3),  # 0.998 0.998 0.995 and 0.999 0.998 0.996
        ([[0.99994, 0.99982]], 4),
        ([[1.0, 1.0, 1.0]], 5),  # copies of one image: no number of decimals tells them apart
        ([[0.5]], 2),
    ],
)
def test_captions_have_the_decimals_that_differ(similarity: list[list[float]], expected: int) -> None:
    assert decimals(similarity) == expected


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


def test_names_of_files_stand_below_where_there_are_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, xy, line, **k: (written.append(line), text(self, xy, line, **k))
    )
    views = torch.full((1, 2, 32, 32, 3), 128, dtype=torch.uint8)
    files = ["a.jpg"], [["b.jpg", "n02101006_Gordon_setter.JPEG"]]
    draw(views[:, 0], views, [[0.91, 0.5]], None, None, (), tmp_path / "r.png", files)
    assert {"a.jpg", "b.jpg", "0.91"} <= set(written)
    (long,) = (line for line in written if "…" in line)
    assert long.startswith("n02")
    assert long.endswith(".JPEG")
