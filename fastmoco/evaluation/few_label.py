"""The few-label probe: a classifier from a few labels of every class, drawn again and again.

N images · D features · C classes
"""

from __future__ import annotations

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

C = 1.0  # strength of the labels against the decay of the weights, see `logistic.fit_logistic`


def draw_labelled(labels: np.ndarray, amount: Amount, class_names: tuple[str, ...], seed: int) -> np.ndarray:
    """Rows of the images whose labels are used, in order: of every class its amount, a function of the seed alone.

    labels (N,) int64. Raises DataError for a class with fewer images than asked, or of which a share leaves none.
    """
    order, rows = permutation(seed, Domain.SUBSET, len(labels)), []
    for label, name in enumerate(class_names):
        members = order[labels[order] == label]
        wanted = amount.of(len(members))
        if wanted > len(members) or wanted == 0:
            problem = "fewer than asked for" if wanted else "of which the share leaves none"
            instead = f"use {len(members) if wanted else 1}-per-class" if len(members) else "add some"
            raise DataError(
                f"--labels {amount.text}: the class '{printable(name)}' has {len(members):,} labelled images, "
                f"{problem}: {instead}, or leave the few-label probe out"
            )
        rows.append(members[:wanted])
    return np.sort(np.concatenate(rows))


@dataclass(frozen=True)
class FewLabels:
    """Top-1 over several draws: their mean and sample standard deviation (None for a single one), and each."""

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
    draws: list[np.ndarray],
    amount: Amount,
    num_classes: int,
    c: float = C,
) -> FewLabels:
    """Logistic regression from the rows of every draw, asked for all queries. Its optimum is unique: only labels vary.

    features (N, D), labels (N,), queries (M, D), query_labels (M,).
    """
    each = []
    for drawn in draws:
        rows = torch.from_numpy(drawn).to(features.device)
        fitted = fit_logistic(features[rows], labels[rows], num_classes, c)
        each.append(measure(fitted.scores(queries), query_labels.cpu()).top1_percent)
    spread = float(np.std(each, ddof=1)) if len(each) > 1 else None
    return FewLabels(amount.text, len(draws[0]), float(np.mean(each)), spread, tuple(each))
