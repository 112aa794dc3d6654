"""Few-label probe: logistic regression on a few labels per class, repeated over several random draws.

N images · D features · C classes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmoco.evaluation.confusion import measure
from fastmoco.evaluation.logistic import fit_logistic
from fastmoco.evaluation.settings import Amount
from pipelines.data.decode import printable
from pipelines.errors import DataError
from pipelines.randomness import Domain, permutation

C = 1.0  # inverse regularisation strength, see `logistic.fit_logistic`


def draw_labelled(labels: np.ndarray, amount: Amount, class_names: tuple[str, ...], seed: int) -> np.ndarray:
    """Stratified draw of labelled images: sorted rows, a pure function of (labels, amount, seed).

    labels (N,) int64. Raises DataError for a class with too few images, or for which the percentage rounds to 0.
    """
    order, rows = permutation(seed, Domain.SUBSET, len(labels)), []
    for label, name in enumerate(class_names):
        members = order[labels[order] == label]
        wanted = amount.of(len(members))
        if wanted > len(members) or wanted == 0:
            problem = "fewer than requested" if wanted else "and the percentage rounds to 0"
            instead = f"use {len(members) if wanted else 1}-per-class" if len(members) else "add some"
            raise DataError(
                f"--labels {amount.text}: the class '{printable(name)}' has {len(members):,} labelled images, "
                f"{problem}: {instead}, or leave the few-label probe out"
            )
        rows.append(members[:wanted])
    return np.sort(np.concatenate(rows))


@dataclass(frozen=True)
class FewLabelAccuracy:
    """Top-1 over several draws: mean, sample standard deviation (None for a single draw) and each value."""

    amount: str
    labels: int
    top1_percent: float
    spread_percent: float | None
    each_percent: tuple[float, ...]


def few_label(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    draws: Iterable[np.ndarray],
    amount: Amount,
    num_classes: int,
    c: float = C,
) -> FewLabelAccuracy:
    """Fit logistic regression on the rows of each draw and measure it on all queries.

    features (N, D), labels (N,), queries (M, D), query_labels (M,). The optimum is unique: only the draw varies.
    """
    each, drawn = [], 0
    for draw in draws:
        drawn = len(draw)
        rows = torch.from_numpy(draw).to(features.device)
        fitted = fit_logistic(features[rows], labels[rows], num_classes, c)
        each.append(measure(fitted.scores(queries), query_labels.cpu()).top1_percent)
    spread = float(np.std(each, ddof=1)) if len(each) > 1 else None
    return FewLabelAccuracy(amount.text, drawn, float(np.mean(each)), spread, tuple(each))
