"""Embedding plot: a 2-D projection of the features by t-SNE or UMAP, one point per image.

N images · D features
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from fastmoco.evaluation.options import Method, check_method
from fastmoco.evaluation.plots import display_name, save, shortened

MIN_POINTS, MAX_POINTS = 5, 2_000  # t-SNE of 2,000 points takes ten seconds on one core
_HALO = [withStroke(linewidth=2, foreground="white")]  # keeps names legible on top of points
_PERPLEXITY = 30.0
_COMPONENTS = 50  # of a PCA before the projection, as in van der Maaten and Hinton 2008, section 4
_MAX_NAMED = 20  # classes in the legend; more have their names among the points
_MAX_THUMBNAILS, _THUMBNAIL_PX, _APART = 64, 56, 0.08  # images drawn where there are no labels


def project(features: Tensor, method: Method = "tsne", seed: int = 0) -> np.ndarray:
    """Project the L2-normalised features (N, D) of 5 or more images to (N, 2) float32 coordinates.

    t-SNE (van der Maaten and Hinton 2008) from scikit-learn, with perplexity 30 or a third of the points; or UMAP with
    its defaults. Large distances mean little in either. Raises ConfigError if UMAP is not installed.
    """
    check_method(method)
    unit = F.normalize(features.detach().float().cpu(), dim=1)
    kept = min(_COMPONENTS, *unit.shape)
    centred = (unit - unit.mean(0)).double()
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    points = (centred @ directions[:kept].T).float().numpy()
    if method == "umap":
        from umap import UMAP  # type: ignore[import-not-found] - an optional package

        return np.asarray(UMAP(random_state=seed).fit_transform(points), dtype=np.float32)
    from sklearn.manifold import TSNE  # slow to import: a second

    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    varies = bool(np.ptp(points) > 0)  # the PCA initialisation divides by the spread of the first component
    return (
        TSNE(perplexity=perplexity, init="pca" if varies else "random", random_state=seed)
        .fit_transform(points)
        .astype(np.float32)
    )


def spaced(points: np.ndarray, count: int = _MAX_THUMBNAILS, apart: float = _APART) -> np.ndarray:
    """Rows of up to `count` points (N, 2), each as far as possible from those before it, and never closer than `apart`
    times the larger side of all points: an even choice of the plane."""
    chosen = [int(np.argmin(np.square(points - points.mean(0)).sum(1)))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < min(count, len(points)):
        distance = np.minimum(distance, np.square(points - points[chosen[-1]]).sum(1))
        if distance.max() <= np.square(apart * np.ptp(points, axis=0).max()):
            break
        chosen.append(int(distance.argmax()))
    return np.array(chosen)


class Thumbnails(NamedTuple):
    """Images to draw at some of the points: their rows (n,), pixels (n, S, S, 3) uint8 and names."""

    rows: np.ndarray
    pixels: np.ndarray
    names: Sequence[str]


def draw(
    points: np.ndarray,
    labels: np.ndarray | None,
    names: tuple[str, ...],
    title: str,
    path: Path,
    thumbnails: Thumbnails | None = None,
) -> None:
    """Write a PNG of points (N, 2), coloured by class if labels (N,) are given.

    Up to 20 classes get a legend; the names of more are written at the median of their points. Without labels,
    `thumbnails` show what the points are. Raises OSError if writing fails.
    """
    named = labels is not None and len(names) <= _MAX_NAMED
    large = thumbnails is not None or (labels is not None and not named)
    width, height = (10.5, 10.2) if large else (8.4 if named else 6.8, 6.6)
    figure = Figure(figsize=(width, height), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = float(np.clip(9_000 / len(points), 5, 40))
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.8}
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], color="#2f5d9b", **style)
    elif not named:
        axes.scatter(points[:, 0], points[:, 1], c=labels / max(1, len(names) - 1), cmap="hsv", **style)
        for label in np.unique(labels):
            x, y = np.median(points[labels == label], axis=0)
            axes.text(x, y, display_name(names[label]), fontsize=7, ha="center", va="center", path_effects=_HALO)
    else:
        colours = colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
        order = np.random.default_rng(0).permutation(len(points))  # so that no class hides all others
        axes.scatter(points[order, 0], points[order, 1], color=[colours[i] for i in labels[order]], **style)
        for name, colour in zip(names, colours, strict=False):
            axes.scatter(
                [], [], color=colour, s=40, label=" " + display_name(name)
            )  # a bare leading underscore would hide it
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_color("#444444")
    if thumbnails is not None:
        _draw_thumbnails(axes, points, thumbnails)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#333333")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_color("#dddddd")
    save(figure, path)


def _draw_thumbnails(axes: Axes, points: np.ndarray, thumbnails: Thumbnails) -> None:
    for row, pixels, name in zip(*thumbnails, strict=True):
        small = Image.fromarray(pixels).resize((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
        image = OffsetImage(np.asarray(small), zoom=72 / axes.figure.dpi)  # its pixels are those of the figure
        axes.add_artist(AnnotationBbox(image, tuple(points[row]), frameon=False, pad=0))
        axes.annotate(
            display_name(shortened(name, 16)),
            tuple(points[row]),
            xytext=(0, -_THUMBNAIL_PX / 2 * 72 / axes.figure.dpi - 1),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=6,
            color="#444444",
            path_effects=_HALO,
        )
