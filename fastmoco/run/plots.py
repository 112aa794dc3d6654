"""Pictures of a run: what the encoders see, what two pipelines make of it, and how the training went.

B pairs · S side of a view in pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmoco.run.metrics import Record

# ---- views -----------------------------------------------------------------------------------------------------------

_SIDE_PX = (96, 160)  # a view is drawn no smaller and no larger
_GUTTER_PX, _GAP_PX, _MARGIN_PX, _HEADER_PX = 2, 14, 14, 22  # in a couple, between couples, around, above
_MAGNIFIED = 8  # differences, to be seen
_INK, _PAPER = (110, 110, 110), (255, 255, 255)


def views_grid(
    query: Tensor,
    key: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    columns: int = 8,
) -> None:
    """A PNG of couples, the query view left and the key view of the same image right, `columns` couples a row.

    query, key (B, 3, S, S) float, normalised by mean and std a channel; row i of both is of one image. Small views are
    enlarged by a whole factor, pixels staying sharp squares. Raises ValueError on other shapes, OSError on writing.
    """
    if query.ndim != 4 or query.shape[1] != 3 or query.shape != key.shape or len(query) == 0 or columns < 1:
        raise ValueError(f"expected two sets (B, 3, S, S) of views, found {tuple(query.shape)} and {tuple(key.shape)}")
    couples = list(zip(_tiles(query, mean, std), _tiles(key, mean, std), strict=True))
    side, columns = couples[0][0].width, min(columns, len(couples))
    couple_px, rows = 2 * side + _GUTTER_PX, -(-len(couples) // columns)
    width = 2 * _MARGIN_PX + columns * couple_px + (columns - 1) * _GAP_PX
    height = _MARGIN_PX + _HEADER_PX + rows * side + (rows - 1) * _GAP_PX + _MARGIN_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (left_tile, right_tile) in enumerate(couples):
        row, column = divmod(number, columns)
        left = _MARGIN_PX + column * (couple_px + _GAP_PX)
        top = _MARGIN_PX + _HEADER_PX + row * (side + _GAP_PX)
        sheet.paste(left_tile, (left, top))
        sheet.paste(right_tile, (left + side + _GUTTER_PX, top))
        if row == 0:
            for name, center in (("query", left + side // 2), ("key", left + side + _GUTTER_PX + side // 2)):
                draw.text((center, top - 6), name, fill=_INK, font=font, anchor="ms")
    sheet.save(path, "PNG")


def comparison_grid(
    names: Sequence[str],
    drawn: Sequence[tuple[Tensor, Tensor]],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
) -> None:
    """A PNG with a column for each image: what two pipelines made of its query, and how far apart; then of its key.

    names  of the two pipelines; `drawn` holds their (query, key), each as in `views_grid`
    The third and the sixth row are |difference| × 8, from black for equal pixels. Raises ValueError on other shapes
    and OSError on writing.
    """
    (a_query, a_key), (b_query, b_key) = drawn
    if not a_query.shape == a_key.shape == b_query.shape == b_key.shape or len(a_query) == 0:
        raise ValueError(f"expected views of one shape, found {[tuple(v.shape) for pair in drawn for v in pair]}")
    rows: list[tuple[str, list[Image.Image]]] = []
    zero, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for view, a, b in (("query", a_query, b_query), ("key", a_key, b_key)):
        rows += [(f"{view}\n{name}", _tiles(views, mean, std)) for name, views in zip(names, (a, b), strict=True)]
        apart = (a - b).abs() * torch.tensor(std, dtype=a.dtype).view(3, 1, 1) * _MAGNIFIED
        rows.append((f"{view}\n{_MAGNIFIED} x |difference|", _tiles(apart, zero, one)))
    side, columns = rows[0][1][0].width, len(a_query)
    font = ImageFont.load_default(13)
    label_px = _GAP_PX + math.ceil(max(font.getlength(line) for label, _ in rows for line in label.split("\n")))
    gaps = [_GAP_PX if number == len(rows) // 2 else _GUTTER_PX for number in range(len(rows))]
    width = _MARGIN_PX + label_px + columns * (side + _GUTTER_PX) - _GUTTER_PX + _MARGIN_PX
    sheet = Image.new("RGB", (width, 2 * _MARGIN_PX + len(rows) * side + sum(gaps[1:])), _PAPER)
    draw, top = ImageDraw.Draw(sheet), _MARGIN_PX
    for number, (label, tiles) in enumerate(rows):
        top += gaps[number] if number else 0
        draw.multiline_text((_MARGIN_PX, top + side // 2), label, fill=_INK, font=font, anchor="lm", spacing=4)
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (_MARGIN_PX + label_px + column * (side + _GUTTER_PX), top))
        top += side
    sheet.save(path, "PNG")


def _tiles(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Image.Image]:
    scale, shift = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (std, mean))
    pixels = (views.detach().cpu().float() * scale + shift).mul(255).round().nan_to_num(0).clamp(0, 255).byte()
    images = [Image.fromarray(array) for array in np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())]
    side, (smallest, largest) = views.shape[-1], _SIDE_PX
    if side < smallest:
        factor = -(-smallest // side)
        return [image.resize((side * factor, side * factor), Image.Resampling.NEAREST) for image in images]
    if side > largest:
        return [image.resize((largest, largest), Image.Resampling.LANCZOS) for image in images]
    return images


# ---- curves ----------------------------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    field: str
    title: str  # with the last value
    colour: str
    from_zero: bool


_PANELS = (
    _Panel("loss", "loss  {:.3f}", "#2f5d9b", False),
    _Panel("knn_top1_percent", "kNN top-1  {:.1f} %", "#2e7d4f", False),
    _Panel("lr", "learning rate  {:.3g}", "#8a5a2b", True),
    _Panel("images_per_s", "speed  {:,.0f} images/s", "#6d4c8d", True),
)


def curves(metrics: Sequence[Record], path: Path, chance_loss: float) -> None:
    """A PNG with a panel each for the loss, kNN accuracy, learning rate and images/s, of those that were measured.

    `metrics` as `read_metrics` returns them. A value that is not finite leaves a gap; chance_loss, the loss of an
    encoder that knows nothing, is a dashed line. Raises OSError on writing.
    """
    series = [(panel, *_points(metrics, panel.field)) for panel in _PANELS]
    series = [(panel, steps, values) for panel, steps, values in series if any(map(math.isfinite, values))]
    columns, rows = min(2, max(1, len(series))), max(1, -(-len(series) // 2))
    figure = Figure(figsize=(1 + 5 * columns, 0.3 + 2.9 * rows), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    if not series:
        figure.text(0.5, 0.5, "nothing measured yet", ha="center", va="center", color="#777777")
    last_step = max((steps[-1] for _, steps, _ in series), default=0)
    for number, (panel, steps, values) in enumerate(series, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw(axes, panel, steps, values)
        axes.set_xlim(-0.02 * max(1, last_step), 1.02 * max(1, last_step))  # the same in all panels
        if panel.field == "loss":
            axes.axhline(chance_loss, color="#999999", linewidth=1, linestyle=(0, (5, 4)))
            axes.annotate(
                f"chance {chance_loss:.2f}",
                (1, chance_loss),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color="#777777",
                fontsize=8,
            )
            axes.margins(y=0.12)
    figure.savefig(path, format="png")


def _points(metrics: Sequence[Record], field: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], float(record[field])) for record in metrics if record.get(field) is not None]
    return [step for step, _ in found], [value if math.isfinite(value) else math.nan for _, value in found]


def _draw(axes: Axes, panel: _Panel, steps: list[int], values: list[float]) -> None:
    few = len(values) <= 30
    axes.plot(
        steps, values, color=panel.colour, linewidth=1.6 if few else 1.1, marker="o" if few else "", markersize=3.5
    )
    last = next(value for value in reversed(values) if math.isfinite(value))
    axes.set_title(panel.title.format(last), loc="left", fontsize=10, fontweight="bold", color=panel.colour)
    axes.set_xlabel("step", fontsize=8, color="#555555")
    axes.tick_params(labelsize=8, colors="#555555")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if panel.field == "images_per_s":
        axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    if panel.from_zero:
        axes.set_ylim(bottom=0)
