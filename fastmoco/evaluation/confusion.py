"""How scores and labels agree: top-1, top-5, accuracy of every class, and which class is taken for which.

M images asked for · C classes
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fastmoco.files import write_atomically

_NAMED = 30  # classes whose names and counts can be read in the picture


@dataclass(frozen=True, eq=False)
class Accuracy:
    """What a classifier makes of M labelled images.

    top1_percent  images whose own class has the highest score
    top5_percent  images whose own class is among the five highest; None with five classes or fewer
    confusion     (C, C) int64, row: the class of an image, column: the class it is taken for
    """

    top1_percent: float
    top5_percent: float | None
    confusion: np.ndarray

    @property
    def per_class_percent(self) -> list[float | None]:
        """Top-1 of the images of every class; None for a class without images."""
        right, images = self.confusion.diagonal().tolist(), self.confusion.sum(axis=1).tolist()
        return [100 * r / n if n else None for r, n in zip(right, images, strict=True)]


@torch.no_grad()
def measure(scores: Tensor, labels: Tensor) -> Accuracy:
    """Top-1, top-5 and confusion of scores (M, C) float, higher is likelier, for labels (M,) int64.

        own = scores.gather(1, labels[:, None])
        before = (scores > own).sum(1) + ((scores == own) & (arange(C) < labels[:, None])).sum(1)
        top-1 = mean(before < 1), top-5 = mean(before < 5)

    Of equal scores the lowest class comes first. A class with a score of -inf or NaN is never right, even among the
    first five: no vote is no guess. Raises ValueError on other shapes and without images.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(f"expected scores (M, C) and labels (M,); found {tuple(scores.shape)}, {tuple(labels.shape)}")
    classes = torch.arange(scores.shape[1], device=scores.device)
    known = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    own = known.gather(1, labels[:, None])
    before = (known > own).sum(1) + ((known == own) & (classes < labels[:, None])).sum(1)
    before = torch.where(own[:, 0] == -math.inf, scores.shape[1], before)
    cells = labels * scores.shape[1] + known.argmax(1)
    confusion = torch.bincount(cells, minlength=scores.shape[1] ** 2).view(-1, scores.shape[1])
    top1, top5 = (100 * (before < k).double().mean().item() for k in (1, 5))
    return Accuracy(top1, top5 if scores.shape[1] > 5 else None, confusion.cpu().numpy())


def write_csv(accuracy: Accuracy, names: tuple[str, ...], path: Path) -> None:
    """The confusion matrix with the names of the classes: a row for every true class. Raises OSError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true class / predicted", *names])
    writer.writerows([name, *row] for name, row in zip(names, accuracy.confusion.tolist(), strict=True))
    write_atomically(path, text.getvalue())


def draw(accuracy: Accuracy, names: tuple[str, ...], title: str, path: Path) -> None:
    """A PNG of the confusion matrix, every row in percent of its class; up to 30 classes with names and numbers.

    Raises OSError on writing.
    """
    count = len(names)
    images = accuracy.confusion.sum(axis=1, keepdims=True)
    percent = 100 * accuracy.confusion / np.maximum(images, 1)
    named = count <= _NAMED
    side = 2.2 + 0.42 * max(4, count) if named else 7.5
    figure = Figure(figsize=(side + 0.9, side), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#333333")
    axes.set_xlabel("taken for", fontsize=9, color="#555555")
    axes.set_ylabel("true class", fontsize=9, color="#555555")
    if named:
        ticks = [shown(name) for name in names]
        axes.set_xticks(range(count), ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(count), ticks, fontsize=8)
        for row, column in np.argwhere(np.rint(percent) >= 1):
            value = percent[row, column]
            colour = "white" if value > 55 else "#333333"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
    axes.tick_params(length=0, colors="#444444")
    axes.spines[:].set_color("#bbbbbb")
    bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("% of the true class", fontsize=8, color="#555555")
    bar.ax.tick_params(labelsize=8, colors="#555555")
    bar.outline.set_visible(False)  # type: ignore[operator] - an artist, whatever its annotation says
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG. Letters that the font lacks become boxes, without a warning for each. Raises OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        figure.savefig(path, format="png")


def shown(name: str, longest: int = 22) -> str:
    """A name as matplotlib prints it letter by letter: without formulas between dollars, and not too long."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    plain = plain if len(plain) <= longest else plain[: longest - 1] + "…"
    return plain.replace("$", r"\$")
