"""A map of the features: every image a point in the plane, near the images whose features are like its own.

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

from fastmoco.evaluation.confusion import save, shown
from fastmoco.evaluation.options import Method, check_method

MAX_POINTS = 2_000  # t-SNE of so many takes ten seconds of one core
LEAST_POINTS = 5
_PERPLEXITY = 30.0
_COMPONENTS = 50  # principal components that are kept first, as van der Maaten and Hinton do (2008, section 4)
_LISTED = 20  # classes with a colour and a name of their own


def project(features: Tensor, method: Method = "tsne", seed: int = 0) -> np.ndarray:
    """(N, 2) float32 coordinates of features (N, D) of unit length, N of 5 or more.

    t-SNE (van der Maaten and Hinton 2008) from scikit-learn, of perplexity 30 or a third of the points; or UMAP with
    its defaults. Distances between far points mean little in either. Raises ConfigError where UMAP is not installed.
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
    from sklearn.manifold import TSNE  # takes a second to import

    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    spread = bool(np.ptp(points) > 0)  # its scale divides by the spread of the first direction
    start = "pca" if spread else "random"
    return TSNE(perplexity=perplexity, init=start, random_state=seed).fit_transform(points).astype(np.float32)


def draw(points: np.ndarray, labels: np.ndarray | None, names: tuple[str, ...], title: str, path: Path) -> None:
    """A PNG of the points (N, 2), coloured by class where labels (N,) are known; up to 20 classes are named.

    Raises OSError on writing.
    """
    listed = labels is not None and len(names) <= _LISTED
    figure = Figure(figsize=(8.4 if listed else 6.8, 6.6), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = float(np.clip(9_000 / len(points), 5, 40))
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.8}
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], color="#2f5d9b", **style)
    elif not listed:
        axes.scatter(points[:, 0], points[:, 1], c=labels / max(1, len(names) - 1), cmap="hsv", **style)
    else:
        colours = colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
        order = np.random.default_rng(0).permutation(len(points))  # so that no class lies on top of all others
        axes.scatter(points[order, 0], points[order, 1], color=[colours[i] for i in labels[order]], **style)
        for name, colour in zip(names, colours, strict=False):
            axes.scatter([], [], color=colour, s=40, label=" " + shown(name))  # a bare leading underscore would hide it
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_color("#444444")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color="#333333")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_color("#dddddd")
    save(figure, path)
