"""Top-1, top-5 and confusion by hand; the CSV and the picture of a matrix."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.evaluation.confusion import draw, measure, write_csv


def test_accuracies_and_matrix_worked_out_by_hand() -> None:
    """Seven classes; the own class comes first, second, sixth and last."""
    scores = torch.tensor(
        [[9.0, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7]]
    )
    found = measure(scores, torch.tensor([0, 1, 5, 0]))
    assert (found.top1_percent, found.top5_percent) == (25.0, 50.0)
    assert found.confusion.sum() == 4
    assert {tuple(cell) for cell in np.argwhere(found.confusion).tolist()} == {(0, 0), (1, 0), (5, 0), (0, 6)}
    assert found.per_class_percent == [50.0, 0.0, None, None, None, 0.0, None]


def test_of_equal_scores_the_lowest_class_wins() -> None:
    found = measure(torch.zeros(7, 7), torch.arange(7))
    assert found.top1_percent == pytest.approx(100 / 7)
    assert found.top5_percent == pytest.approx(500 / 7)
    assert (found.confusion[:, 0] == 1).all()


def test_a_class_without_a_score_is_no_guess() -> None:
    """All other classes are -inf or NaN: five guesses find nothing, though there are only six classes."""
    scores = torch.full((2, 6), -math.inf)
    scores[:, 3] = 1.0
    scores[1, 2] = math.nan
    found = measure(scores, torch.tensor([1, 2]))
    assert (found.top1_percent, found.top5_percent) == (0.0, 0.0)
    assert found.confusion[1, 3] == found.confusion[2, 3] == 1


def test_top_5_says_nothing_of_five_classes() -> None:
    assert measure(torch.eye(5), torch.arange(5)).top5_percent is None
    assert measure(torch.eye(6), torch.arange(6)).top5_percent == 100


def test_top_5_is_torch_topk_where_no_scores_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 20, generator=generator)
    labels = torch.randint(0, 20, (300,), generator=generator)
    right = (scores.topk(5).indices == labels[:, None]).any(1)
    assert measure(scores, labels).top5_percent == pytest.approx(100 * right.double().mean().item())


def test_shapes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores \(M, C\)"):
        measure(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))


def test_the_csv_has_a_row_for_every_true_class(tmp_path: Path) -> None:
    names = ('a, "quoted"', "b", "c")
    found = measure(torch.eye(3)[[1, 1, 2]], torch.tensor([0, 1, 2]))
    write_csv(found, names, tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["true class / predicted", *names],
        [names[0], "0", "1", "0"],
        ["b", "0", "1", "0"],
        ["c", "0", "0", "1"],
    ]


@pytest.mark.parametrize("count", [12, 120])
def test_the_picture_shows_right_and_wrong(tmp_path: Path, count: int) -> None:
    """The diagonal is dark where all are right, and light where all are taken for another."""
    names = tuple(f"$class_{i}$\x1b 鳥" for i in range(count))

    def darkest_share(scores: torch.Tensor) -> float:
        draw(measure(scores, torch.arange(count)), names, "title", tmp_path / "m.png")
        with Image.open(tmp_path / "m.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        matrix = pixels[:, : int(0.78 * pixels.shape[1])]
        return float(((matrix[..., 2] > 90) & (matrix[..., 0] < 30)).mean())

    right = darkest_share(torch.eye(count))
    assert right > 0.3 / count
    assert darkest_share(torch.eye(count).roll(1, 0)) == pytest.approx(right, rel=0.3), "as dark, beside the diagonal"
