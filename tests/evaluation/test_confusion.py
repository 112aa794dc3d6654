"""Top-1, top-5 and confusion matrices against hand-computed values; CSV and plot of a matrix."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.evaluation.confusion import measure, write_confusion
from fastmoco.evaluation.confusion_plot import confused_pairs, draw_confusion


def test_hand_computed_accuracies_and_matrix() -> None:
    """Seven classes; the true class is ranked first, second, sixth and last."""
    scores = torch.tensor(
        [[9.0, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7]]
    )
    accuracy = measure(scores, torch.tensor([0, 1, 5, 0]))
    assert (accuracy.top1_percent, accuracy.top5_percent) == (25.0, 50.0)
    assert accuracy.confusion.sum() == 4
    assert {tuple(cell) for cell in np.argwhere(accuracy.confusion).tolist()} == {(0, 0), (1, 0), (5, 0), (0, 6)}
    assert accuracy.per_class_percent == [50.0, 0.0, None, None, None, 0.0, None]


def test_ties_go_to_the_lowest_class() -> None:
    accuracy = measure(torch.zeros(7, 7), torch.arange(7))
    assert accuracy.top1_percent == pytest.approx(100 / 7)
    assert accuracy.top5_percent == pytest.approx(500 / 7)
    assert (accuracy.confusion[:, 0] == 1).all()


def test_a_class_without_a_score_is_never_a_hit() -> None:
    """All classes but one are -inf or NaN: no top-5 hits, although there are only six classes."""
    scores = torch.full((2, 6), -math.inf)
    scores[:, 3] = 1.0
    scores[1, 2] = math.nan
    accuracy = measure(scores, torch.tensor([1, 2]))
    assert (accuracy.top1_percent, accuracy.top5_percent) == (0.0, 0.0)
    assert accuracy.confusion[1, 3] == accuracy.confusion[2, 3] == 1


def test_top_5_is_undefined_for_five_classes() -> None:
    assert measure(torch.eye(5), torch.arange(5)).top5_percent is None
    assert measure(torch.eye(6), torch.arange(6)).top5_percent == 100


def test_top_5_equals_torch_topk_without_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 20, generator=generator)
    labels = torch.randint(0, 20, (300,), generator=generator)
    hits = (scores.topk(5).indices == labels[:, None]).any(1)
    assert measure(scores, labels).top5_percent == pytest.approx(100 * hits.double().mean().item())


def test_invalid_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"scores \(M, C\)"):
        measure(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))


def test_the_csv_has_one_row_per_true_class(tmp_path: Path) -> None:
    names = ('a, "quoted"', "b", "c")
    accuracy = measure(torch.eye(3)[[1, 1, 2]], torch.tensor([0, 1, 2]))
    write_confusion(accuracy, names, tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["true class / predicted", *names],
        [names[0], "0", "1", "0"],
        ["b", "0", "1", "0"],
        ["c", "0", "0", "1"],
    ]


@pytest.mark.parametrize("count", [12, 120])
def test_the_plot_is_dark_where_predictions_are(tmp_path: Path, count: int) -> None:
    """The diagonal is dark if all predictions are correct, and light if all are wrong."""
    names = tuple(f"$class_{i}$\x1b 鳥" for i in range(count))

    def darkest_share(scores: torch.Tensor) -> float:
        draw_confusion(measure(scores, torch.arange(count)), names, "title", tmp_path / "m.png")
        with Image.open(tmp_path / "m.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        matrix = pixels[:, : int((0.78 if count == 12 else 0.75) * pixels.shape[1])]  # without the colour bar
        return float(((matrix[..., 2] > 90) & (matrix[..., 0] < 30)).mean())

    correct = darkest_share(torch.eye(count))
    assert correct > 0.3 / count
    assert darkest_share(torch.eye(count).roll(1, 0)) == pytest.approx(correct, rel=0.3), "as dark, off the diagonal"


def test_the_pairs_that_are_confused_most_are_listed() -> None:
    percent = np.array([[50.0, 20.0, 30.0], [0.0, 100.0, 0.0], [10.0, 0.0, 90.0]])
    assert confused_pairs(percent, ("cat", "dog", "fox")) == [
        "30 %  cat → fox",
        "20 %  cat → dog",
        "10 %  fox → cat",
    ]
    assert percent[0, 0] == 50, "unchanged"
