"""Pictures of a run: grids of views, differences between two pipelines, and training curves.

B pairs · S side of a view in pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from fastmoco.console import short
from fastmoco.run.metrics import Record, points
from fastmoco.run.png import save_figure, save_image, shown_bands

# ---- views -----------------------------------------------------------------------------------------------------------

# Of a drawn view. Sixteen photographs with two views each take 1.2 MB, and 4.5 MB in twice the width and height.
_MIN_SIDE_PX, _MAX_SIDE_PX = 96, 128
_PADDING_PX, _GAP_PX, _HEADER_PX = 2, 10, 20  # around a view, around a pair or section, above the grid
_DIFFERENCE_SCALE = 8  # makes small differences visible
_TEXT_COLOUR, _FONT_PX, _WHITE = (110, 110, 110), 13, 255


def views_grid(
    query: Tensor,
    key: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    columns: int = 4,
    originals: Sequence[np.ndarray] = (),
) -> None:
    """Write a PNG of pairs, the query view left and the key view of the same image right, `columns` pairs per row.

    originals  the images (H, W, C) uint8 that the views are of, drawn left of them; if empty, there are none
    query, key (B, C, S, S) float, normalised by the channels' mean and std; row i of both is of one image. Small views
    are enlarged by a whole factor without interpolation. Raises ValueError on other shapes, OSError if writing fails.
    """
    if query.ndim != 4 or query.shape[1] != len(mean) or query.shape != key.shape or len(query) == 0 or columns < 1:
        raise ValueError(
            f"expected two sets of views (B, {len(mean)}, S, S), got shapes {tuple(query.shape)} and {tuple(key.shape)}"
        )
    pairs = zip(_to_pixels(query, mean, std), _to_pixels(key, mean, std), strict=True)
    names, groups = ["query", "key"], [list(pair) for pair in pairs]
    if originals:
        names.insert(0, "image")
        side = groups[0][0].shape[-1]
        groups = [[_fit(image, side), *group] for image, group in zip(originals, groups, strict=True)]
    tiles = [_grid(group, len(names), _PADDING_PX) for group in groups]
    grid = _grid(tiles, columns, _GAP_PX)
    sheet = to_pil_image(F.pad(grid, (0, 0, _HEADER_PX, 0), value=_WHITE))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    tile_px, baseline = tiles[0].shape[-1], _HEADER_PX + _GAP_PX - 4
    for column in range(min(columns, len(tiles))):
        left = _GAP_PX + column * (tile_px + _GAP_PX)
        for i, name in enumerate(names):
            middle = left + tile_px * (2 * i + 1) // (2 * len(names))
            draw.text((middle, baseline), name, fill=_TEXT_COLOUR, font=font, anchor="ms")
    save_image(sheet, path)


def comparison_grid(
    names: Sequence[str],
    drawn: Sequence[tuple[Tensor, Tensor]],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
) -> None:
    """Write a PNG with one column per image: the query of two pipelines and their difference, then the same for the
    key.

    names  of the two pipelines; `drawn` holds (query, key) of each, as in `views_grid`
    The third and sixth rows are |difference| × 8, black where pixels are equal. Raises ValueError on other shapes,
    OSError if writing fails.
    """
    (a_query, a_key), (b_query, b_key) = drawn
    if not a_query.shape == a_key.shape == b_query.shape == b_key.shape or len(a_query) == 0:
        raise ValueError(f"expected views of one shape, got {[tuple(v.shape) for pair in drawn for v in pair]}")
    labels, sections = [], []
    for view, a, b in (("query", a_query, b_query), ("key", a_key, b_key)):
        difference = (a - b).abs() * torch.tensor(std, dtype=a.dtype).view(-1, 1, 1) * _DIFFERENCE_SCALE
        rows = [
            _to_pixels(a, mean, std),
            _to_pixels(b, mean, std),
            _to_pixels(difference, (0,) * len(mean), (1,) * len(mean)),
        ]
        sections.append(_grid(torch.cat(rows), columns=len(a), padding=_PADDING_PX))
        labels += [f"{view}\n{text}" for text in (*names, f"{_DIFFERENCE_SCALE} x |difference|")]
    font = ImageFont.load_default(_FONT_PX)
    label_px = math.ceil(max(font.getlength(line) for label in labels for line in label.split("\n")))
    sheet = to_pil_image(F.pad(_grid(sections, 1, _GAP_PX), (_GAP_PX + label_px, 0, 0, 0), value=_WHITE))
    draw, section_px = ImageDraw.Draw(sheet), sections[0].shape[1]
    for number, label in enumerate(labels):
        section, row = divmod(number, 3)
        middle = _GAP_PX + section * (section_px + _GAP_PX) + section_px * (2 * row + 1) // 6
        draw.multiline_text((_GAP_PX, middle), label, fill=_TEXT_COLOUR, font=font, anchor="lm", spacing=4)
    save_image(sheet, path)


def _fit(image: np.ndarray, side: int) -> Tensor:
    """An image (H, W, C) uint8 as large as fits into a white square, (3, side, side) uint8."""
    bands = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, axis=-1)
    method = Image.Resampling.NEAREST if max(image.shape[:2]) < side else Image.Resampling.LANCZOS
    return pil_to_tensor(ImageOps.pad(Image.fromarray(bands), (side, side), method, color=(_WHITE,) * 3))


def _grid(tiles: Tensor | list[Tensor], columns: int, padding: int) -> Tensor:
    """uint8 tiles (3, H, W) on white; unlike `make_grid` alone, also pads a single tile."""
    if len(tiles) == 1:
        return F.pad(tiles[0], (padding,) * 4, value=_WHITE)
    return make_grid(tiles, nrow=columns, padding=padding, pad_value=_WHITE)


def _to_pixels(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised views (B, C, S, S) → uint8 pixels (B, 3, …) in the size in which they are drawn; NaN is black."""
    std_, mean_ = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (std, mean))
    pixels = shown_bands(views.detach().cpu().float() * std_ + mean_).mul(255).nan_to_num(0).clamp(0, 255)
    side = views.shape[-1]
    if side < _MIN_SIDE_PX:
        pixels = F.interpolate(pixels, scale_factor=float(math.ceil(_MIN_SIDE_PX / side)), mode="nearest")
    elif side > _MAX_SIDE_PX:
        pixels = F.interpolate(pixels, size=(_MAX_SIDE_PX, _MAX_SIDE_PX), mode="bicubic", antialias=True)
    return pixels.round().clamp(0, 255).byte()


# ---- curves ----------------------------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    field: str
    title: str  # formatted with the last value
    colour: str
    from_zero: bool = False
    in_steps: bool = False  # a value holds for the steps up to its own


_LABELLED = _Panel("knn_top1_percent", "kNN top-1  {:.1f} %", "#2e7d4f")
_UNLABELLED = _Panel("alignment", "alignment  {:.3f}, lower is better", "#2e7d4f")
_PANELS = (
    _Panel("loss", "loss  {:.3f}", "#2f5d9b"),
    _Panel("uniformity", "uniformity  {:.2f}, lower is better", "#b5522b"),
    _Panel("effective_rank", "effective rank  {:.1f}", "#3a7f8c", True),
    _Panel("lr", "learning rate  {}", "#8a5a2b", True, True),
    _Panel("images_per_s", "speed  {:,.0f} images/s", "#6d4c8d", True),
)


def curves(metrics: Sequence[Record], path: Path, chance_loss: float) -> None:
    """Write a PNG with one panel for each of the loss, kNN accuracy or alignment, uniformity, effective rank, learning
    rate and images/s that was measured.

    `metrics` as `read_metrics` returns them. A value that is not finite leaves a gap, and a cross at the bottom;
    chance_loss, the loss at chance level, and kNN accuracy of raw pixels are dashed lines. Raises OSError if writing
    fails.
    """
    labelled = any("knn_top1_percent" in record for record in metrics)
    panels = (_PANELS[0], _LABELLED if labelled else _UNLABELLED, *_PANELS[1:])
    series = [(panel, *points(metrics, panel.field)) for panel in panels]
    series = [(panel, steps, values) for panel, steps, values in series if any(map(math.isfinite, values))]
    columns, rows = min(2, max(1, len(series))), max(1, -(-len(series) // 2))
    figure = Figure(figsize=(1 + 5 * columns, 0.3 + 2.9 * rows), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    if not series:
        figure.text(0.5, 0.5, "no measurements yet", ha="center", va="center", color="#777777")
    last_step = max((steps[-1] for _, steps, _ in series), default=0)
    for number, (panel, steps, values) in enumerate(series, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw(axes, panel, steps, values)
        axes.set_xlim(-0.02 * max(1, last_step), 1.02 * max(1, last_step))  # the same range in all panels
        if panel.field == "loss":
            _draw_level(axes, chance_loss, f"chance {chance_loss:.2f}")
        elif panel is _LABELLED:
            for level in points(metrics, "knn_pixels_top1_percent")[1][:1]:
                _draw_level(axes, level, f"raw pixels {level:.1f} %")
    save_figure(figure, path)


def _draw_level(axes: Axes, level: float, text: str) -> None:
    """A dashed line across the panel."""
    if not math.isfinite(level):
        return
    axes.axhline(level, color="#999999", linewidth=1, linestyle=(0, (5, 4)))
    axes.annotate(
        text,
        (1, level),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        color="#777777",
        fontsize=8,
    )
    axes.margins(y=0.12)


def _draw(axes: Axes, panel: _Panel, steps: list[int], values: list[float]) -> None:
    few = len(values) <= 30
    axes.plot(
        steps,
        values,
        color=panel.colour,
        linewidth=1.6 if few else 1.1,
        marker="o" if few and not panel.in_steps else "",
        markersize=3.5,
        drawstyle="steps-pre" if panel.in_steps else "default",
    )
    missing = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if missing:
        axes.plot(missing, [0.03] * len(missing), "x", color="#c0392b", transform=axes.get_xaxis_transform())
        axes.annotate(
            "not finite",
            (missing[0], 0.03),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 7),
            textcoords="offset points",
            color="#c0392b",
            fontsize=8,
        )
    last = next(value for value in reversed(values) if math.isfinite(value))
    title = panel.title.format(short(last) if panel.field == "lr" else last)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=panel.colour)
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
