"""Pictures of a run: views are at the expected positions, and curves show what was measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastmoco.run.plots import curves, views_grid

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def normalised(colours: list[tuple[int, int, int]], side: int) -> torch.Tensor:
    pixels = torch.tensor(colours, dtype=torch.float32).view(-1, 3, 1, 1).expand(-1, -1, side, side) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize(("side", "drawn"), [(32, 96), (40, 120), (128, 128), (224, 128)])
def test_every_key_is_right_of_its_query(tmp_path: Path, side: int, drawn: int) -> None:
    queries = [(10 * n, 200, 30) for n in range(5)]
    keys = [(10 * n, 20, 250) for n in range(5)]
    views_grid(normalised(queries, side), normalised(keys, side), MEAN, STD, tmp_path / "views.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "views.png"))
    assert sheet.shape[1] < 3 * (2 * drawn + 2) + 80
    for query, key in zip(queries, keys, strict=True):
        rows, columns = np.nonzero((sheet == query).all(2))
        key_rows, key_columns = np.nonzero((sheet == key).all(2))
        assert len(rows) == len(key_rows) == drawn * drawn
        assert (rows.min(), rows.max()) == (key_rows.min(), key_rows.max())
        assert 1 <= key_columns.min() - columns.max() <= 4


def test_views_of_other_shapes_are_rejected_and_nan_is_black(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="views"):
        views_grid(torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 8, 8), MEAN, STD, tmp_path / "views.png")
    views_grid(torch.full((1, 3, 8, 8), math.nan), torch.full((1, 3, 8, 8), 1e9), MEAN, STD, tmp_path / "views.png")
    sheet = np.asarray(Image.open(tmp_path / "views.png"))
    assert (sheet == 0).all(2).sum() == 96 * 96


@pytest.mark.parametrize("size", [(40, 80), (300, 600)], ids=["smaller", "larger"])
def test_an_image_is_left_of_its_views_whole_and_in_its_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    image, red, blue = np.full((*size, 3), (10, 200, 30), np.uint8), (250, 20, 20), (20, 20, 250)
    views = normalised([red], 32), normalised([blue], 32)
    views_grid(*views, MEAN, STD, tmp_path / "views.png", originals=[image])
    sheet = np.asarray(Image.open(tmp_path / "views.png"))
    rows, columns = np.nonzero((sheet == image[0, 0]).all(2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (48, 96), "twice as wide as high"
    query, key = (np.nonzero((sheet == colour).all(2))[1] for colour in (red, blue))
    assert columns.max() < query.min() <= query.max() < key.min()


def test_the_rate_holds_until_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    records = [{"step": step, "epoch": 0, "lr": lr} for step, lr in ((50, 0.03), (100, 0.03), (150, 0.003))]
    curves(records, tmp_path / "curves.png", chance_loss=8.32)
    assert [line.get_drawstyle() for line in drawn[0].axes[0].lines] == ["steps-pre"]


@pytest.mark.parametrize(
    ("records", "titles"),
    [
        ([], []),
        ([{"step": 0, "epoch": 0, "loss": math.nan}], []),
        ([{"step": 0, "epoch": 0, "loss": 8.0}], ["loss  8.000"]),
        ([{"step": 7, "epoch": 1, "knn_top1_percent": 45.26}], ["kNN top-1  45.3 %"]),
        (
            [
                {"step": 0, "epoch": 0, "loss": math.nan, "lr": 0.03, "images_per_s": 100.0},
                {"step": 0, "epoch": 0, "knn_top1_percent": 20.0, "knn_pixels_top1_percent": 35.4},
                {"step": 1000, "epoch": 1, "knn_top1_percent": 30.0, "alignment": 0.2, "uniformity": -1.25},
                {"step": 2000, "epoch": 2, "loss": 7.5, "lr": 1000, "images_per_s": 50123.0},
                {"step": 3000, "epoch": 3, "loss": math.nan},
            ],
            [
                "loss  7.500",
                "kNN top-1  30.0 %",
                "uniformity  -1.25, lower is better",
                "learning rate  1,000",
                "speed  50,123 images/s",
            ],
        ),
        (
            [{"step": 10, "epoch": 1, "alignment": 0.2, "uniformity": -1.25, "effective_rank": 12.34}],
            ["alignment  0.200, lower is better", "uniformity  -1.25, lower is better", "effective rank  12.3"],
        ),
    ],
    ids=["nothing", "only NaN", "one point", "only kNN", "everything", "without labels"],
)
def test_curves_show_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[dict], titles: list[str]
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    curves(records, tmp_path / "curves.png", chance_loss=8.32)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == titles
    texts = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
    expected = ["chance 8.32"] if any(title.startswith("loss") for title in titles) else []
    expected += ["raw pixels 35.4 %"] if any("knn_pixels_top1_percent" in record for record in records) else []
    assert [text for text in texts if text != "not finite"] == expected
    gaps = bool(drawn[0].axes) and any(math.isnan(value) for record in records for value in record.values())
    assert ("not finite" in texts) == gaps
