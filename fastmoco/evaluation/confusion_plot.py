"""Plot of a confusion matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastmoco.evaluation.confusion import Accuracy
from fastmoco.evaluation.plots import display_name, save

_MAX_NAMED = 30  # classes; names and numbers of more would not be legible


def draw_confusion(accuracy: Accuracy, names: tuple[str, ...], title: str, path: Path) -> None:
    """Write a PNG of the confusion matrix, each row in percent of its class; up to 30 classes get names and numbers.

    Raises OSError if writing fails.
    """
    count = len(names)
    images = accuracy.confusion.sum(axis=1, keepdims=True)
    percent = 100 * accuracy.confusion / np.maximum(images, 1)
    named = count <= _MAX_NAMED
    side = 2.2 + 0.42 * max(4, count) if named else 7.5
    figure = Figure(figsize=(side + 0.9, side), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#333333")
    axes.set_xlabel("predicted class", fontsize=9, color="#555555")
    axes.set_ylabel("true class", fontsize=9, color="#555555")
    if named:
        ticks = [display_name(name) for name in names]
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
    bar.outline.set_visible(False)  # type: ignore[operator] - wrong annotation in matplotlib
    save(figure, path)
