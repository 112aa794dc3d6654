"""L2-regularised logistic regression (scikit-learn) on frozen features: a linear probe without a learning rate.

N images · M queries · D features · C classes
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmoco.evaluation.confusion import measure
from pipelines.randomness import Domain, permutation

C_CANDIDATES = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # for `choose_c`
VALIDATION = 10  # one image in ten validates the choice of C
MAX_TUNING_IMAGES = 10_000  # to choose C: five fits take a minute on one core with 512 features
MAX_ITERATIONS = 1_000


class Logistic(NamedTuple):
    """A fitted classifier, float64: weight (C, D) and bias (C,) for inputs (features - shift) / scale, shift (D,)."""

    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: float
    converged: bool

    def scores(self, features: Tensor) -> Tensor:
        """(M, D) → logits (M, C), float64 on the CPU; -inf for classes absent from the training labels."""
        return (features.cpu().double() - self.shift) / self.scale @ self.weight.T + self.bias


def fit_bytes(feature_dim: int, num_classes: int) -> int:
    """Bytes per image that `fit_logistic` holds on the host: float64 features and logits, and two copies of each."""
    return 3 * 8 * (feature_dim + num_classes)


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, c: float) -> Logistic:
    """Minimise ½ ‖W‖² + c · Σ cross_entropy(x Wᵀ + b) over W and b with L-BFGS, in float64 on the CPU.

        x = (features - features.mean(0)) / features.var(0).mean().sqrt()

    A single scale preserves the ratios between features, and makes `c` comparable between backbones. `converged` is
    False if L-BFGS reached MAX_ITERATIONS.

    features (N, D), labels (N,) int64 in [0, num_classes) of two classes or more. Raises ValueError on other labels.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import: seconds
    from sklearn.linear_model import LogisticRegression

    x, y = features.cpu().double(), labels.cpu().numpy()
    shift = x.mean(0)
    scale = float((x - shift).square().mean().sqrt()) or 1.0
    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(((x - shift) / scale).numpy(), y)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64)
    bias = torch.full((num_classes,), -torch.inf, dtype=torch.float64)
    present = torch.from_numpy(model.classes_.astype(np.int64))
    coefficients, intercepts = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(present) == 2:  # for two classes, scikit-learn returns only the difference of their logits
        coefficients = torch.cat([torch.zeros_like(coefficients), coefficients])
        intercepts = torch.cat([torch.zeros_like(intercepts), intercepts])
    weight[present], bias[present] = coefficients, intercepts
    return Logistic(weight, bias, shift, scale, converged)


def choose_c(features: Tensor, labels: Tensor, num_classes: int, on_fit: Callable[[], None] = lambda: None) -> float:
    """The value of `C_CANDIDATES` with the best top-1 on a held-out tenth of the images; of equals, the smallest.

    Uses at most 10,000 images. Returns 1 if the training images are of a single class.
    """
    drawn = torch.from_numpy(permutation(0, Domain.SUBSET, len(features))[:MAX_TUNING_IMAGES]).to(features.device)
    validation, training = drawn.tensor_split([max(1, len(drawn) // VALIDATION)])
    if len(labels[training].unique()) < 2:
        return 1.0

    def top1(c: float) -> float:
        fitted = fit_logistic(features[training], labels[training], num_classes, c)
        on_fit()
        return measure(fitted.scores(features[validation]), labels[validation].cpu()).top1_percent

    return max(C_CANDIDATES, key=top1)  # the first of equals
