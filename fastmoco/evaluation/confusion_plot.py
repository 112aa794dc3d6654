"""Plot of a confusion matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastmoco.evaluation.confusion import Accuracy
from fastmoco.evaluation.plots import display_name, save

_MAX_NUMBERS = 30  # classes; the numbers of more would not be legible
_MAX_NAMED = 150  # classes, with a smaller font
_MAX_PAIRS = 25  # of classes that are confused, listed where there are too many for numbers


def draw_confusion(accuracy: Accuracy, names: tuple[str, ...], title: str, path: Path) -> None:
    """Write a PNG of the confusion matrix, each row in percent of its class.

    Up to 30 classes get names and numbers; up to 150 names. Beside more than 30, the pairs that are confused most are
    listed. Raises OSError if writing fails.
    """
    count = len(names)
    images = accuracy.confusion.sum(axis=1, keepdims=True)
    percent = 100 * accuracy.confusion / np.maximum(images, 1)
    numbers, named = count <= _MAX_NUMBERS, count <= _MAX_NAMED
    side = 2.2 + 0.42 * max(4, count) if numbers else 2.2 + 0.13 * count if named else 7.5
    pairs = [] if numbers else confused_pairs(percent, names)
    figure = Figure(figsize=(side + 0.9 + (4.0 if pairs else 0), side + (0.9 if pairs else 0)), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes, *others = figure.subplots(1, 2 if pairs else 1, width_ratios=[side, 4.0][: 2 if pairs else 1], squeeze=False)[
        0
    ]
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#333333")
    axes.set_xlabel("predicted class", fontsize=9, color="#555555")
    axes.set_ylabel("true class", fontsize=9, color="#555555")
    if named:
        ticks = [display_name(name) for name in names]
        angle, size = (45, 8) if numbers else (90, 6.5)
        anchor = {"ha": "right", "va": "center", "rotation_mode": "anchor"} if angle == 90 else {"ha": "right"}
        axes.set_xticks(range(count), ticks, rotation=angle, fontsize=size, **({"rotation_mode": "anchor"} | anchor))
        axes.set_yticks(range(count), ticks, fontsize=size)
    if numbers:
        for row, column in np.argwhere(np.rint(percent) >= 1):
            value = percent[row, column]
            colour = "white" if value > 55 else "#333333"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
    for panel in others:
        panel.set_axis_off()
        panel.set_title("confused most: true → predicted", loc="left", fontsize=10, fontweight="bold", color="#333333")
        panel.text(0, 1, "\n".join(pairs), va="top", fontsize=8, linespacing=1.5, transform=panel.transAxes)
    axes.tick_params(length=0, colors="#444444")
    axes.spines[:].set_color("#bbbbbb")
    bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("% of the true class", fontsize=8, color="#555555")
    bar.ax.tick_params(labelsize=8, colors="#555555")
    bar.outline.set_visible(False)  # type: ignore[operator] - wrong annotation in matplotlib
    save(figure, path)


def confused_pairs(percent: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """Lines for the largest entries of a confusion matrix (C, C), in percent of the true class, off its diagonal."""
    wrong = percent.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]
    cells = [divmod(int(i), len(names)) for i in order if wrong.flat[i] > 0]
    return [f"{wrong[i, j]:.0f} %  {display_name(names[i], 26)} → {display_name(names[j], 26)}" for i, j in cells]
