"""Logistic regression equals scikit-learn's, for any scale of the features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fastmoco.evaluation.confusion import measure
from fastmoco.evaluation.logistic import C_CANDIDATES, choose_c, fit_logistic


def blobs(count: int, num_queries: int, *, classes: int = 7, dim: int = 10, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Features, labels, queries and their labels: overlapping Gaussian clusters."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.1 * torch.randn(classes, dim, generator=generator)
    labels = torch.arange(count + num_queries) % classes
    features = scale * (centres[labels] + torch.randn(count + num_queries, dim, generator=generator))
    return features[:count], labels[:count], features[count:], labels[count:]


@pytest.mark.parametrize("classes", [2, 7])
def test_scores_equal_those_of_scikit_learn(classes: int) -> None:
    features, labels, queries, _ = blobs(300, 500, classes=classes)
    fitted = fit_logistic(features, labels, classes, c=0.1)
    mean, scale = features.mean(0), (features - features.mean(0)).square().mean().sqrt()
    reference = LogisticRegression(C=0.1, max_iter=1000).fit(((features - mean) / scale).numpy(), labels)
    expected = reference.predict_proba(((queries - mean) / scale).numpy())
    assert fitted.converged
    torch.testing.assert_close(
        fitted.scores(queries).softmax(1), torch.from_numpy(expected).double(), rtol=0, atol=1e-3
    )
    assert (
        fitted.scores(queries).argmax(1).numpy() == reference.predict(((queries - mean) / scale).numpy())
    ).mean() > 0.99


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_scale_and_shift_of_the_features_do_not_matter(factor: float) -> None:
    features, labels, queries, _ = blobs(200, 100)
    plain = fit_logistic(features, labels, 7, c=0.5).scores(queries)
    transformed = fit_logistic(factor * (features - 5), labels, 7, c=0.5).scores(factor * (queries - 5))
    torch.testing.assert_close(plain, transformed, rtol=0, atol=1e-2)


def test_a_class_without_training_images_is_never_predicted() -> None:
    features, labels, queries, _ = blobs(300, 100)
    present = (labels == 2) | (labels == 5)
    scores = fit_logistic(features[present], labels[present], 7, c=1.0).scores(queries)
    assert set(scores.argmax(1).tolist()) == {2, 5}
    assert scores.isinf().any(0).tolist() == [True, True, False, True, True, False, True]


def test_constant_features_give_chance_accuracy() -> None:
    fitted = fit_logistic(torch.ones(20, 3), torch.arange(20) % 2, 2, c=1.0)
    assert measure(fitted.scores(torch.ones(10, 3)), torch.arange(10) % 2).top1_percent == 50


def test_c_is_tuned_against_overfitting() -> None:
    """Few images with many noise dimensions overfit with a large C."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(400) % 2
    features = torch.randn(400, 200, generator=generator)
    features[:, 0] += 1.5 * labels
    assert choose_c(features, labels, 2) < max(C_CANDIDATES)
    assert choose_c(features, labels, 2) == choose_c(features, labels, 2)
    assert choose_c(features[:4], torch.zeros(4, dtype=torch.long), 2) == 1.0


def test_non_convergence_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.evaluation.logistic.MAX_ITERATIONS", 1)
    features, labels, _, _ = blobs(100, 1)
    assert not fit_logistic(features, labels, 7, c=1.0).converged
    assert np.isfinite(fit_logistic(features, labels, 7, c=1.0).weight.numpy()).all()
