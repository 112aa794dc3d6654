"""Regularised logistic regression from scikit-learn on frozen features: a linear probe without a learning rate.

N images · M queries · D features · C classes
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fastmoco.evaluation.confusion import measure
from pipelines.randomness import Domain, permutation

STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # of C, which `choose_c` tries
HELD_OUT = 10  # one image in ten chooses
CHOOSING = 10_000  # images at most: five fits take a minute of one core at 512 features
MAX_ITERATIONS = 1_000


class Logistic(NamedTuple):
    """A fitted classifier: weight (C, D) and bias (C,) float64, for features less `shift` (D,), divided by `scale`."""

    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: float
    converged: bool

    def scores(self, features: Tensor) -> Tensor:
        """(M, D) → (M, C) float64 on the CPU; -inf for a class that it was not fitted with."""
        return (features.double().cpu() - self.shift) / self.scale @ self.weight.T + self.bias


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, c: float) -> Logistic:
    """The minimum over W and b of ½ ‖W‖² + c · Σ cross_entropy(x Wᵀ + b), in float64 on the CPU.

        x = (features - features.mean(0)) / features.var(0).mean().sqrt()

    One scale for all features keeps their proportions, and gives `c` the same meaning for every backbone. Minimised by
    L-BFGS; `converged` says whether it got there. Biases do not decay.

    features (N, D), labels (N,) int64 in [0, num_classes) of two classes or more. Raises ValueError on other labels.
    """
    x, y = features.double().cpu(), labels.cpu().numpy()
    shift = x.mean(0)
    scale = float((x - shift).square().mean().sqrt()) or 1.0
    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(((x - shift) / scale).numpy(), y)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64)
    bias = torch.full((num_classes,), -torch.inf, dtype=torch.float64)
    seen = torch.from_numpy(model.classes_.astype(np.int64))
    coefficients, intercepts = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(seen) == 2:  # scikit-learn gives the difference alone
        coefficients = torch.cat([torch.zeros_like(coefficients), coefficients])
        intercepts = torch.cat([torch.zeros_like(intercepts), intercepts])
    weight[seen], bias[seen] = coefficients, intercepts
    return Logistic(weight, bias, shift, scale, converged)


def choose_c(features: Tensor, labels: Tensor, num_classes: int) -> float:
    """The strength of `STRENGTHS` with the best top-1 on a held-out tenth of the images, the smallest of equals.

    At most 10,000 images take part. 1 where those to fit on are of one class.
    """
    drawn = torch.from_numpy(permutation(0, Domain.SUBSET, len(features))[:CHOOSING]).to(features.device)
    asks, answers = drawn.tensor_split([max(1, len(drawn) // HELD_OUT)])
    if len(labels[answers].unique()) < 2:
        return 1.0
    best, chosen = -1.0, STRENGTHS[0]
    for c in STRENGTHS:
        fitted = fit_logistic(features[answers], labels[answers], num_classes, c)
        top1 = measure(fitted.scores(features[asks]), labels[asks].cpu()).top1_percent
        if top1 > best:
            best, chosen = top1, c
    return chosen
