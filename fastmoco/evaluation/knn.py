"""Weighted kNN on frozen features, the evaluation of MoCo's CIFAR demo.

N images in the bank · M queries · D length of a feature · k neighbours. After Wu et al. 2018 (instance discrimination),
section 3.4: each of the k nearest neighbours votes for its class with weight exp(cosine similarity / T).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_BYTES = 256 * 2**20  # for the (chunk, N) similarities


@torch.no_grad()
def knn_classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
    in_place: bool = False,
) -> Tensor:
    """Predict the class with the most votes for every query.

        similarity = normalize(queries) @ normalize(bank).T
        values, neighbours = similarity.topk(min(k, N))
        votes = zeros(M, num_classes).scatter_add(1, bank_labels[neighbours], exp((values - values.max) / temperature))
        predictions = votes.argmax(1)

    Subtracting the largest similarity scales all votes of a query by one factor, so that no temperature overflows.
    Similarities and votes are computed in float32, or float64 for float64 features, also under autocast. The lowest of
    classes with equal votes wins; which of several equally distant kth neighbours votes is unspecified.

    bank (N, D) and queries (M, D) float, bank_labels (N,) int64 in [0, num_classes), all on one device
    → (M,) int64. A zero feature has similarity 0 to all others. `in_place` normalises the bank itself, which saves a
    copy. Raises ValueError on other shapes and labels.
    """
    _check(bank, bank_labels, queries, k, temperature, num_classes)
    bank = _normalised(bank, in_place)
    parts = [_votes(bank, bank_labels, rows, k, temperature, num_classes).argmax(1) for rows in _chunks(bank, queries)]
    return torch.cat(parts)


@torch.no_grad()
def knn_votes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int = 200, temperature: float = 0.1, num_classes: int
) -> Tensor:
    """The votes that `knn_classify` counts: (M, num_classes), 0 for a class without neighbours."""
    _check(bank, bank_labels, queries, k, temperature, num_classes)
    bank = _normalised(bank, in_place=False)
    votes = bank.new_empty(len(queries), num_classes)
    for rows, own in zip(_chunks(bank, queries), _chunks(bank, votes), strict=True):
        own.copy_(_votes(bank, bank_labels, rows, k, temperature, num_classes))
    return votes


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
    in_place: bool = False,
) -> float:
    """Accuracy of `knn_classify` in percent, for query labels (M,) int64. NaN without queries."""
    predicted = knn_classify(
        bank, bank_labels, queries, k=k, temperature=temperature, num_classes=num_classes, in_place=in_place
    )
    return 100 * (predicted == labels).double().mean().item()


def _normalised(bank: Tensor, in_place: bool) -> Tensor:
    """Unit-norm rows in float32, or float64 for float64 features."""
    bank = bank.to(torch.float64 if bank.dtype == torch.float64 else torch.float32)
    return F.normalize(bank, dim=1, out=bank if in_place else None)


def _chunks(bank: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Parts of the queries, or of what belongs to them, whose similarities to the bank take `_CHUNK_BYTES`."""
    return rows.split(max(1, _CHUNK_BYTES // (len(bank) * bank.element_size())))


def _votes(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int) -> Tensor:
    values, neighbours = top_k_neighbours(bank, queries.to(bank.dtype), k)
    return count_votes(values, labels[neighbours], temperature, num_classes)


def top_k_neighbours(bank: Tensor, queries: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosine similarities, largest first, and rows of the min(k, N) nearest neighbours in a normalised bank: (M, k).

    exclude  (M,) one row of the bank per query that is not a neighbour: the query itself
    """
    with torch.autocast(bank.device.type, enabled=False):
        similarity = F.normalize(queries, dim=1) @ bank.T
    if exclude is not None:
        similarity.scatter_(1, exclude[:, None], -math.inf)
    return similarity.topk(min(k, len(bank) - (exclude is not None)), dim=1)


def count_votes(values: Tensor, classes: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Votes (M, num_classes) of neighbours with these similarities, largest first, and classes, (M, k) each."""
    weights = ((values - values[:, :1]) / temperature).exp()
    return weights.new_zeros(len(values), num_classes).scatter_add_(1, classes, weights)


def _check(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1] or labels.shape != bank.shape[:1]:
        raise ValueError(
            f"kNN expects a bank (N, D), labels (N,) and queries (M, D), got {tuple(bank.shape)}, "
            f"{tuple(labels.shape)} and {tuple(queries.shape)}"
        )
    if len(bank) == 0 or k < 1 or temperature <= 0:
        raise ValueError(f"kNN needs images in the bank, k and T above 0, got {len(bank)}, {k} and {temperature}")
    low, high = (int(extreme) for extreme in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"kNN labels are between {low} and {high}, expected 0 to {num_classes - 1}")
