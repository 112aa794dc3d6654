"""Plot of a sweep: accuracy by setting, beside the results of the paper."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from fastmoco.config.checks import flag
from fastmoco.recipes import PUBLISHED
from fastmoco.run.png import save_figure
from fastmoco.sweep.runs import Axis, Cell, paper_percent

_COLOURS = ("#2b6ca3", "#b5522b", "#3f7d4e", "#6d4c8d", "#8a5a2b", "#555555")
_PAPER = "#999999"
_HALO = [withStroke(linewidth=3, foreground="white")]  # keeps labels legible on top of lines


def draw_sweep(cells: Sequence[Cell], axes: Sequence[Axis], path: Path) -> None:
    """Write a PNG of kNN accuracy (effective rank without labels) by the first setting, one line per combination of the
    others; dashed: the untrained encoder. In an ablation, the results of the paper are in a second panel, whose title
    says that other images and another classifier were used.

    Values are equally spaced, since they may be names or powers of ten. Raises OSError if writing fails.
    """
    paper = [(cell, percent) for cell in cells for in_paper, percent in [paper_percent(cell)] if in_paper]
    figure = Figure(figsize=(9.5 if paper else 5.6, 3.9), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if paper else 1, squeeze=False)[0]
    _draw_ours(panels[0], cells, axes)
    if paper:
        published = PUBLISHED[axes[0].field]
        positions = [axes[0].values.index(cell.values[axes[0].field]) for cell, _ in paper]
        _points(panels[1], positions, [percent for _, percent in paper], _PAPER, "", _is_numeric(axes[0]))
        _finish(panels[1], axes[0], "paper: compare the order only", f"top-1, %, {published.what}", published.source)
    save_figure(figure, path)


def _draw_ours(panel: Axes, cells: Sequence[Cell], axes: Sequence[Axis]) -> None:
    first, others = axes[0], axes[1:]
    labelled = any(cell.knn_percent is not None for cell in cells)
    name = "knn_percent" if labelled else "effective_rank"
    lines: dict[str, list[Cell]] = {}
    for cell in cells:
        label = ", ".join(f"{flag(axis.field).lstrip('-')} {cell.values[axis.field]}" for axis in others)
        lines.setdefault(label, []).append(cell)
    for number, (label, members) in enumerate(lines.items()):
        ended = [cell for cell in members if cell.outcome != "not run"]
        positions = [first.values.index(cell.values[first.field]) for cell in ended]
        values = [cell.results.get(name) if cell.outcome == "done" else None for cell in ended]
        _points(panel, positions, values, _COLOURS[number % len(_COLOURS)], label, _is_numeric(first))
    before = [cell.results["knn_before_percent"] for cell in cells if "knn_before_percent" in cell.results]
    if labelled and before:
        level = sum(before) / len(before)
        panel.axhline(level, color="#999999", linewidth=1, linestyle=(0, (5, 4)))
        panel.annotate(
            f"untrained {level:.1f}",
            (0, level),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            color="#777777",
            fontsize=8,
        )
    if len(lines) > 1:
        panel.legend(fontsize=8, frameon=False)
    _finish(panel, first, "this sweep", "kNN top-1, %" if labelled else "effective rank", "")


def _is_numeric(axis: Axis) -> bool:
    """Whether all values are numbers, so that a line may join the points."""
    try:
        return all(math.isfinite(float(value)) for value in axis.values)
    except ValueError:
        return False


def _points(
    panel: Axes, positions: list[int], values: Sequence[float | None], colour: str, label: str, joined: bool
) -> None:
    """Plot points labelled with their values; a failed run is a cross at the bottom."""
    measured = [(position, value) for position, value in zip(positions, values, strict=True) if value is not None]
    panel.plot(
        [position for position, _ in measured],
        [value for _, value in measured],
        color=colour,
        marker="o",
        markersize=5,
        linewidth=1.6 if joined else 0,
        label=label or None,
    )
    for position, value in measured:
        panel.annotate(
            f"{value:.1f}",
            (position, value),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=colour,
            fontweight="bold",
            path_effects=_HALO,
        )
    for position, value in zip(positions, values, strict=True):
        if value is None:
            panel.plot([position], [0.04], "x", color=colour, markersize=8, transform=panel.get_xaxis_transform())
            panel.annotate(
                "fails",
                (position, 0.04),
                xycoords=panel.get_xaxis_transform(),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=colour,
            )


def _finish(panel: Axes, axis: Axis, title: str, metric: str, source: str) -> None:
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    panel.set_title("\n".join(textwrap.wrap(source, 40)), loc="right", fontsize=8, color="#777777")
    panel.set_xticks(range(len(axis.values)), axis.values)
    panel.set_xlim(-0.5, len(axis.values) - 0.5)
    panel.set_xlabel(flag(axis.field).lstrip("-"), fontsize=9, color="#555555")
    panel.set_ylabel("\n".join(textwrap.wrap(metric, 40)), fontsize=9, color="#555555")
    panel.tick_params(labelsize=9, colors="#555555")
    panel.margins(y=0.18)
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#bbbbbb")
