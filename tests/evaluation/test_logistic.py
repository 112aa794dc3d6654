"""Logistic regression on features: scikit-learn's classes and numbers, whatever the scale of the features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fastmoco.evaluation.confusion import measure
from fastmoco.evaluation.logistic import STRENGTHS, choose_c, fit_logistic


def blobs(count: int, asked: int, *, classes: int = 7, dim: int = 10, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Features, labels, queries and their labels: overlapping Gaussian clouds."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.1 * torch.randn(classes, dim, generator=generator)
    labels = torch.arange(count + asked) % classes
    features = scale * (centres[labels] + torch.randn(count + asked, dim, generator=generator))
    return features[:count], labels[:count], features[count:], labels[count:]


@pytest.mark.parametrize("classes", [2, 7])
def test_the_scores_are_scikit_learns(classes: int) -> None:
    features, labels, queries, _ = blobs(300, 500, classes=classes)
    fitted = fit_logistic(features, labels, classes, c=0.1)
    mean, scale = features.mean(0), (features - features.mean(0)).square().mean().sqrt()
    theirs = LogisticRegression(C=0.1, max_iter=1000).fit(((features - mean) / scale).numpy(), labels)
    wanted = theirs.predict_proba(((queries - mean) / scale).numpy())
    assert fitted.converged
    torch.testing.assert_close(fitted.scores(queries).softmax(1), torch.from_numpy(wanted).double(), rtol=0, atol=1e-3)
    assert (
        fitted.scores(queries).argmax(1).numpy() == theirs.predict(((queries - mean) / scale).numpy())
    ).mean() > 0.99


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_scale_and_shift_of_the_features_do_not_count(factor: float) -> None:
    features, labels, queries, _ = blobs(200, 100)
    plain = fit_logistic(features, labels, 7, c=0.5).scores(queries)
    moved = fit_logistic(factor * (features - 5), labels, 7, c=0.5).scores(factor * (queries - 5))
    torch.testing.assert_close(plain, moved, rtol=0, atol=1e-2)


def test_a_class_that_was_not_seen_is_never_guessed() -> None:
    features, labels, queries, _ = blobs(300, 100)
    known = (labels == 2) | (labels == 5)
    scores = fit_logistic(features[known], labels[known], 7, c=1.0).scores(queries)
    assert set(scores.argmax(1).tolist()) == {2, 5}
    assert scores.isinf().any(0).tolist() == [True, True, False, True, True, False, True]


def test_equal_features_tell_nothing_and_break_nothing() -> None:
    fitted = fit_logistic(torch.ones(20, 3), torch.arange(20) % 2, 2, c=1.0)
    assert measure(fitted.scores(torch.ones(10, 3)), torch.arange(10) % 2).top1_percent == 50


def test_the_strength_is_chosen_where_it_matters() -> None:
    """Few images in many dimensions of noise: labels that are trusted too much are learned by heart."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(400) % 2
    features = torch.randn(400, 200, generator=generator)
    features[:, 0] += 1.5 * labels
    assert choose_c(features, labels, 2) < max(STRENGTHS)
    assert choose_c(features, labels, 2) == choose_c(features, labels, 2)
    assert choose_c(features[:4], torch.zeros(4, dtype=torch.long), 2) == 1.0


def test_what_did_not_converge_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.evaluation.logistic.MAX_ITERATIONS", 1)
    features, labels, _, _ = blobs(100, 1)
    assert not fit_logistic(features, labels, 7, c=1.0).converged
    assert np.isfinite(fit_logistic(features, labels, 7, c=1.0).weight.numpy()).all()
