"""Top-1, top-5 and per-class accuracy and the confusion matrix of a classifier.

M images · C classes
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.files import write_csv

_CHUNK_BYTES = 256 * 2**20  # for the scores of a chunk of images, of which four temporary copies are made


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Accuracy of a classifier on M labelled images.

    top1_percent  images whose true class has the highest score
    top5_percent  images whose true class is among the five highest; None with five classes or fewer
    confusion     (C, C) int64, rows: true class, columns: predicted class
    """

    top1_percent: float
    top5_percent: float | None
    confusion: np.ndarray

    @property
    def per_class_percent(self) -> list[float | None]:
        """Top-1 accuracy per class; None for a class without images."""
        correct, images = self.confusion.diagonal().tolist(), self.confusion.sum(axis=1).tolist()
        return [100 * c / n if n else None for c, n in zip(correct, images, strict=True)]


@torch.no_grad()
def measure(scores: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of scores (M, C) float, higher is more likely, for labels (M,) int64.

        true = scores.gather(1, labels[:, None])
        rank = (scores > true).sum(1) + ((scores == true) & (arange(C) < labels[:, None])).sum(1)
        top-1 = mean(rank < 1), top-5 = mean(rank < 5)

    Ties go to the lowest class. A class with a score of -inf or NaN is never a hit, not even among the top five.
    (scikit-learn's top_k_accuracy_score rejects such scores, and gives ties to the highest class.) Raises ValueError on
    other shapes and without images.
    """
    from sklearn.metrics import confusion_matrix  # slow to import: seconds

    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(f"expected scores (M, C) and labels (M,), got {tuple(scores.shape)}, {tuple(labels.shape)}")
    chunk = max(1, _CHUNK_BYTES // (scores.shape[1] * scores.element_size()))
    parts = [_ranks(*part) for part in zip(scores.split(chunk), labels.split(chunk), strict=True)]
    rank, predicted = (torch.cat(values) for values in zip(*parts, strict=True))
    confusion = confusion_matrix(labels.cpu(), predicted.cpu(), labels=range(scores.shape[1]))
    top1, top5 = (100 * (rank < k).double().mean().item() for k in (1, 5))
    return Accuracy(top1, top5 if scores.shape[1] > 5 else None, confusion)


def _ranks(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of classes that score higher than the true one, and the class with the highest score, (M,) int64 each."""
    classes = torch.arange(scores.shape[1], device=scores.device)
    known = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    true = known.gather(1, labels[:, None])
    rank = (known > true).sum(1) + ((known == true) & (classes < labels[:, None])).sum(1)
    return torch.where(true[:, 0] == -math.inf, scores.shape[1], rank), known.argmax(1)


def write_confusion(accuracy: Accuracy, names: tuple[str, ...], path: Path) -> None:
    """Write the confusion matrix as CSV with class names, one row per true class. Raises OSError."""
    rows = ([name, *row] for name, row in zip(names, accuracy.confusion.tolist(), strict=True))
    write_csv(path, ["true class / predicted", *names], rows, shared=True)
