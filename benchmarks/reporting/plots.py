"""Plots of a report, as SVG text: bars, learning curves and rooflines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.measure.harness import short
from fastmoco.report_page.svg import svg_text

_INK, _FAINT, _OURS, _BASELINE = "#333333", "#777777", "#2f5d9b", "#b0b7c0"
_COLOURS = {"fp32": "#8a5a2b", "tf32": "#6d4c8d", "bf16": "#2f5d9b", "fp16": "#2e7d4f"}


def bars(rows: Sequence[tuple[str, float, float, float]], baseline: str) -> str:
    """Horizontal bars of images/s, first row on top: (name, median, lower, upper quartile); the baseline is grey."""
    figure, axes = _figure(6.4, 0.75 + 0.3 * len(rows))
    names, medians = [row[0] for row in rows], [row[1] for row in rows]
    spread = [[m - low for _, m, low, _ in rows], [high - m for _, m, _, high in rows]]
    colours = [_BASELINE if name == baseline else _OURS for name in names]
    positions = range(len(rows), 0, -1)
    axes.barh(positions, medians, height=0.62, color=colours, xerr=spread, ecolor=_FAINT, error_kw={"linewidth": 1})
    for position, (_, median, _, high) in zip(positions, rows, strict=True):
        end = (max(median, high), position)
        axes.annotate(short(median), end, xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(positions, names)
    axes.set_xlim(0, 1.15 * max(max(row[1], row[3]) for row in rows))
    axes.set_xlabel("images/s", color=_FAINT)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    return svg_text(figure, "Bars: " + "; ".join(f"{name} {short(median)} images/s" for name, median, _, _ in rows))


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], targets: Sequence[float], x: str, y: str) -> str:
    """A line per name, and a dashed line per target."""
    figure, axes = _figure(6.4, 3.4)
    for colour, (name, points) in zip(list(_COLOURS.values()) * len(lines), lines.items(), strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, marker=".", markersize=4, label=name)
    for target in targets:
        axes.axhline(target, color="#999999", linewidth=1, linestyle=(0, (5, 4)))
    axes.set_xlabel(x, color=_FAINT)
    axes.set_ylabel(y, color=_FAINT)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    return svg_text(figure, f"{y} over {x}: " + "; ".join(f"{n} {points[-1][1]:.1f}" for n, points in lines.items()))


def roofline_plot(step: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    """Log-log plot of FLOP/s over FLOP/byte: a roof per number format, layer groups on it, measured rates below it.

    `step` is an entry of `steps` in roofline.py's result; ceilings are FLOP/s by format, and bytes/s under `copy`.
    """
    figure, axes = _figure(7.2, 4.6)
    bandwidth, formats, low = ceilings["copy"], list(step["formats"]), step["main_format"]
    groups = {n: g for n, g in step["formats"][low]["groups"].items() if g["flops"] > 0}
    intensities = [g["intensity"] for g in groups.values()] + [p["intensity"] for p in step["points"]]
    left, right = min(intensities) / 4, max(*intensities, *(ceilings[f] / bandwidth for f in formats)) * 2
    drawn: list[float] = []
    for name in sorted(formats, key=lambda name: ceilings[name]):
        close = any(ceilings[name] < 1.3 * other for other in drawn)  # its label would overlap the one below
        _roof(axes, ceilings[name], bandwidth, left, right, name, 13 if close else 3)
        drawn.append(ceilings[name])
    for group in groups.values():
        attained = group["flops"] / group["seconds"]
        axes.plot(group["intensity"], attained, "o", mfc="white", mec=_COLOURS[low], ms=5, mew=1.1)
    for name in sorted(groups, key=lambda name: groups[name]["seconds"], reverse=True)[:4]:
        group = groups[name]
        at = (group["intensity"], group["flops"] / group["seconds"])
        label, below = name.removesuffix(" convolutions"), {"xytext": (2, -3), "textcoords": "offset points"}
        axes.annotate(label, at, **below, color=_FAINT, fontsize=7, rotation=-40, ha="left", va="top")
    _points(axes, step["points"])
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    lowest = min([p["flop_per_s"] for p in step["points"]] + [g["flops"] / g["seconds"] for g in groups.values()])
    axes.set_ylim(lowest / 2.5, 2.5 * max(ceilings[name] for name in formats))
    axes.set_xlabel("arithmetic intensity, FLOP/byte", color=_FAINT)
    axes.set_ylabel("FLOP/s", color=_FAINT)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{short(value / 1e12)} T"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color="#eeeeee", linewidth=0.8)
    return svg_text(figure, "Roofline: " + "; ".join(f"{p['name']} {p['share_of_roof']:.0%}" for p in step["points"]))


def _roof(axes: Axes, flop_per_s: float, bandwidth: float, left: float, right: float, name: str, above_pt: int) -> None:
    ridge = flop_per_s / bandwidth
    colour = _COLOURS[name]
    axes.plot([left, ridge, right], [left * bandwidth, flop_per_s, flop_per_s], color=colour, linewidth=1.6)
    label = f"{name} product, {short(flop_per_s / 1e12)} TFLOP/s"
    at = (right, flop_per_s)
    above = {"xytext": (-3, above_pt), "textcoords": "offset points"}
    axes.annotate(label, at, **above, ha="right", color=colour, fontsize=8)
    if left < ridge:
        at = (left * 1.1, left * 1.1 * bandwidth)
        text = f"copy, {short(bandwidth / 1e9)} GB/s"
        axes.annotate(text, at, xytext=(12, -2), textcoords="offset points", va="top", color=_FAINT, fontsize=8)


def _points(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """One column of points per intensity, with labels that do not overlap; those of the leftmost column on its left."""
    leftmost = min(point["intensity"] for point in points)
    last_label: dict[float, float] = {}
    for point in sorted(points, key=lambda p: p["flop_per_s"], reverse=True):
        colour, rate = _COLOURS[point["format"]], point["flop_per_s"]
        axes.plot(point["intensity"], rate, "o", color=colour, ms=6)
        label_at = min(rate, last_label.get(point["intensity"], float("inf")) / 1.16)
        last_label[point["intensity"]] = label_at
        label = f"{point['name']}  {point['share_of_roof']:.0%}"
        is_left = point["intensity"] == leftmost
        offset = {
            "xytext": (-8 if is_left else 8, 0),
            "textcoords": "offset points",
            "ha": "right" if is_left else "left",
        }
        axes.annotate(label, (point["intensity"], label_at), **offset, va="center", color=_INK, fontsize=8)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=_FAINT, labelsize=8)
    axes.set_axisbelow(True)
    return figure, axes
