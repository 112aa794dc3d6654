"""Charts of metrics over training: loss beside chance, accuracy, features, speed and the use of the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastmoco.report_page import svg
from fastmoco.report_page.run_files import RunFiles
from fastmoco.run.metrics import finite_number
from fastmoco.run.metrics import points as recorded

COLOURS = 8  # lines that can be told apart
_MAX_POINTS = 240  # of a line; of more, means are drawn
_FEW_POINTS = 24  # up to which each is marked
_SIZE_IN = (3.9, 2.2)  # the width of a phone at a readable size of text


@dataclass(frozen=True)
class Metric:
    """A field of metrics.jsonl; `name` is its label where a chart has several. Drawn as values × scale."""

    field: str
    name: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Panel:
    """A chart with a line for each metric, all of one unit.

    value    formats the last value
    level    a metric that is measured once, drawn as a dashed line, with its name
    """

    key: str
    title: str
    metrics: tuple[Metric, ...]
    value: Callable[[float], str]
    from_zero: bool = False
    level: Metric | None = None
    only_if_varying: bool = False


def _percent(value: float) -> str:
    return f"{value:.1f} %"


PANELS = (
    Panel("loss", "Loss", (Metric("loss"),), "{:.3f}".format),
    Panel(
        "accuracy",
        "Top-1 accuracy, %",
        (
            Metric("knn_top1_percent", "kNN"),
            Metric("knn_output_top1_percent", "kNN on the output"),
            Metric("linear_top1_percent", "linear"),
        ),
        _percent,
        level=Metric("knn_pixels_top1_percent", "kNN of raw pixels"),
    ),
    Panel("alignment", "Alignment (0 is best)", (Metric("alignment"),), "{:.3f}".format, from_zero=True),
    Panel("uniformity", "Uniformity (lower is more even)", (Metric("uniformity"),), "{:.3f}".format),
    Panel("rank", "Effective rank", (Metric("effective_rank"),), "{:.1f}".format, from_zero=True),
    Panel("lr", "Learning rate", (Metric("lr"),), "{:.3g}".format, from_zero=True),
    Panel("speed", "Speed, images/s", (Metric("images_per_s"),), "{:,.0f}".format, from_zero=True),
    Panel("wait", "Waiting for data, %", (Metric("data_wait_percent"),), _percent, from_zero=True),
    Panel(
        "memory",
        "Memory of the device, GiB",
        (Metric("device_memory_bytes", scale=2**-30),),
        "{:.1f} GiB".format,
        from_zero=True,
    ),
    Panel("power", "Power of the device, W", (Metric("device_power_w"),), "{:.0f} W".format, from_zero=True),
    Panel("threads", "CPU threads", (Metric("cpu_threads"),), "{:.0f}".format, from_zero=True, only_if_varying=True),
)


@dataclass(frozen=True)
class Line:
    """x, y of one line, in epochs or steps; a level has one point, and is drawn over the whole width."""

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    is_level: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawn panel: its last value as text, and the lines of its legend, which may be one without a name."""

    key: str
    title: str
    value: str
    picture: Markup
    legend: Sequence[Line]


def charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """A chart for every panel that a run has values for. The lines of several runs have the runs' colours."""
    in_epochs = all(run.steps_per_epoch for run in runs)
    drawn = []
    for panel in PANELS:
        lines = [line for number, run in enumerate(runs) for line in _lines(panel, run, number, len(runs), in_epochs)]
        levels = {line.y[0] for line in lines if line.is_level}
        if len(levels) > 1:  # those of several runs would not be told apart
            lines = [line for line in lines if not line.is_level]
        if any(not line.is_level for line in lines) and not (panel.only_if_varying and _is_constant(lines)):
            drawn.append(_chart(panel, lines, in_epochs, is_comparison=len(runs) > 1))
    return drawn


def _is_constant(lines: Sequence[Line]) -> bool:
    return len({value for line in lines for value in line.y}) == 1


def points(run: RunFiles, metric: Metric) -> tuple[list[int], list[float]]:
    """Steps and values of a metric as they are shown; a value that is not finite is NaN."""
    steps, values = recorded(run.metrics, metric.field)
    return steps, [value * metric.scale for value in values]


def _lines(panel: Panel, run: RunFiles, number: int, runs: int, in_epochs: bool) -> list[Line]:
    unit = run.steps_per_epoch if in_epochs else 1
    assert unit
    lines = []
    for order, metric in enumerate(panel.metrics):
        steps, values = points(run, metric)
        if any(map(math.isfinite, values)):
            name = run.name if runs > 1 else metric.name
            lines.append(Line(name, number if runs > 1 else order, *_thinned([s / unit for s in steps], values)))
        if lines and runs > 1:
            break  # one line for each run
    if panel.key == "accuracy" and lines and runs == 1 and (accuracy := _linear_percent(run)) is not None:
        lines.append(Line("linear, fastmoco eval", len(panel.metrics), [run.step / unit], [accuracy]))
    level = _level(panel, run)
    if level is not None and lines:
        lines.append(Line(level[0], -1, [0], [level[1]], is_level=True))
    return lines


def _linear_percent(run: RunFiles) -> float | None:
    """Top-1 of the linear probe of `fastmoco eval`, in percent."""
    found = [probe.get("top1_percent") for probe in run.evaluation.get("probes", []) if probe["probe"] == "linear"]
    return found[-1] if found and isinstance(found[-1], int | float) else None


def _level(panel: Panel, run: RunFiles) -> tuple[str, float] | None:
    """Name and value of the dashed line: the loss at chance level, or a metric that is measured once."""
    if panel.key == "loss":
        loss = chance_loss(run)
        return None if loss is None else ("chance", loss)
    if panel.level is None:
        return None
    values = [value for value in points(run, panel.level)[1] if math.isfinite(value)]
    return (panel.level.name, values[0]) if values else None


def chance_loss(run: RunFiles) -> float | None:
    """The loss at chance level, as recorded; of earlier runs ln(candidates), which is that of InfoNCE."""
    if (known := finite_number(run.status.get("chance_loss"))) is not None:
        return known
    model = run.config.model
    if model.objective != "info-nce" or not model.moco_k:
        return None
    return math.log(model.moco_k + (model.mechanism != "end-to-end")) * (2 if model.symmetric else 1)


def _thinned(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """At most `_MAX_POINTS` points: means of as many consecutive ones as needed, NaN where all are."""
    if len(x) <= _MAX_POINTS:
        return x, y
    pieces = [
        (float(np.mean(xs)), [value for value in ys if math.isfinite(value)])
        for xs, ys in zip(np.array_split(x, _MAX_POINTS), np.array_split(y, _MAX_POINTS), strict=True)
    ]
    return [at for at, _ in pieces], [float(np.mean(ys)) if ys else math.nan for _, ys in pieces]


def _chart(panel: Panel, lines: list[Line], in_epochs: bool, is_comparison: bool) -> Chart:
    last = {line.name: panel.value(_last(line)) for line in lines}
    lines = list({(line.name, line.colour): line for line in lines}.values())
    label = f"{panel.title} over {'epochs' if in_epochs else 'steps'}: "
    label += "; ".join(f"{name} {value}".strip() for name, value in last.items())
    own = [line for line in lines if not line.is_level]
    value = last[own[0].name] if not is_comparison else ""
    return Chart(panel.key, panel.title, value, svg.embedded(_draw(panel, lines, in_epochs), panel.key, label), lines)


def _last(line: Line) -> float:
    return next(value for value in reversed(line.y) if math.isfinite(value))


def _draw(panel: Panel, lines: Sequence[Line], in_epochs: bool) -> str:
    figure = Figure(figsize=_SIZE_IN)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    figure.patch.set_visible(False)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for line in lines:
        if line.is_level:
            axes.axhline(line.y[0], color=svg.colour("muted"), linewidth=1.1, linestyle=(0, (4, 3)))
        else:
            few = len(line.y) <= _FEW_POINTS
            style = {"linewidth": 1.5, "marker": "o" if few else "", "markersize": 3.2}
            axes.plot(line.x, line.y, color=svg.colour(f"line-{line.colour % COLOURS + 1}"), **style)
    _finish(axes, panel, in_epochs)
    return svg.svg_text(figure, panel.title)


def _finish(axes: Axes, panel: Panel, in_epochs: bool) -> None:
    muted = svg.colour("muted")
    axes.patch.set_visible(False)
    axes.set_xlabel("epoch" if in_epochs else "step", fontsize=8.5, color=muted)
    axes.tick_params(labelsize=8.5, labelcolor=muted, color=svg.colour("grid"), length=2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.grid(color=svg.colour("grid"), linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(svg.colour("grid"))
    axes.margins(y=0.12)
    axes.set_xlim(left=-0.015 * axes.get_xlim()[1])  # the epoch 0 and its mark
    low, high = axes.get_ylim()
    if panel.from_zero:
        axes.set_ylim(0, 1.12 * axes.dataLim.y1 or 1)
    elif low == high:
        axes.set_ylim(low - 1, high + 1)
