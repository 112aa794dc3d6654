"""Embedding plot: a 2-D projection of the features by t-SNE or UMAP, one point per image.

N images · D features
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fastmoco.evaluation.options import Method, check_method
from fastmoco.evaluation.plots import display_name, save

MIN_POINTS, MAX_POINTS = 5, 2_000  # t-SNE of 2,000 points takes ten seconds on one core
_PERPLEXITY = 30.0
_COMPONENTS = 50  # of a PCA before the projection, as in van der Maaten and Hinton 2008, section 4
_MAX_NAMED = 20  # classes in the legend


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


def draw(points: np.ndarray, labels: np.ndarray | None, names: tuple[str, ...], title: str, path: Path) -> None:
    """Write a PNG of points (N, 2), coloured by class if labels (N,) are given; up to 20 classes get a legend.

    Raises OSError if writing fails.
    """
    named = labels is not None and len(names) <= _MAX_NAMED
    figure = Figure(figsize=(8.4 if named else 6.8, 6.6), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = float(np.clip(9_000 / len(points), 5, 40))
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.8}
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], color="#2f5d9b", **style)
    elif not named:
        axes.scatter(points[:, 0], points[:, 1], c=labels / max(1, len(names) - 1), cmap="hsv", **style)
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
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#333333")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_color("#dddddd")
    save(figure, path)
