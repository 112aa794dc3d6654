"""The linear probe: scikit-learn's optimum, the authors' schedule, and every image once per epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fastmoco.errors import ConfigError
from fastmoco.evaluation.confusion import measure
from fastmoco.evaluation.linear import cached_batches, fit_linear
from fastmoco.evaluation.settings import Sgd
from tests.evaluation.test_logistic import blobs

CPU = torch.device("cpu")


def trained(features: Tensor, labels: Tensor, classes: int, sgd: Sgd) -> torch.nn.Linear:
    batches, steps = cached_batches(features, labels, sgd)
    return fit_linear(batches, steps, features.shape[1], classes, sgd, CPU)


def with_ones(features: Tensor) -> np.ndarray:
    """(N, D + 1) float64: a constant feature whose weight is the bias."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1).double().numpy()


def test_full_batches_reach_the_optimum_of_scikit_learn() -> None:
    """The same objective: mean cross-entropy + ½ wd (‖W‖² + ‖b‖²), which is scikit-learn's with C = 1 / (N · wd) and
    the bias as the weight of a constant feature."""
    features, labels, queries, query_labels = blobs(600, 2000)
    decay = 1e-2
    sgd = Sgd(lr=1.0, epochs=300, batch_size=600, schedule="constant", weight_decay=decay)
    layer = trained(features, labels, 7, sgd)
    reference = LogisticRegression(C=1 / (len(features) * decay), tol=1e-8, max_iter=2000, fit_intercept=False)
    reference.fit(with_ones(features), labels)
    expected = torch.from_numpy(reference.coef_)
    torch.testing.assert_close(layer.weight.detach().double(), expected[:, :-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(layer.bias.detach().double(), expected[:, -1], rtol=0, atol=1e-4)
    top1 = measure(layer(queries), query_labels).top1_percent
    assert 60 < top1 < 95, "the task is neither trivial nor impossible"
    assert top1 == pytest.approx(100 * reference.score(with_ones(queries), query_labels.numpy()), abs=0.1)


def test_the_authors_schedule_ends_near_the_unregularised_optimum() -> None:
    """lr 30 with steps at 60 and 80 %, on features as small as pooled ones: as good as logistic regression."""
    features, labels, queries, query_labels = blobs(2000, 2000, scale=0.1)
    layer = trained(features, labels, 7, Sgd(epochs=30))
    reference = LogisticRegression(C=1e4, max_iter=2000).fit(features.numpy(), labels)
    top1 = measure(layer(queries), query_labels).top1_percent
    assert top1 == pytest.approx(100 * reference.score(queries.numpy(), query_labels.numpy()), abs=1.5)


def test_learning_rates_are_those_of_the_authors() -> None:
    steps = 5
    rates = [Sgd().lr_at(step, steps) for step in range(500)]
    assert rates == pytest.approx([30.0] * 300 + [3.0] * 100 + [0.3] * 100)
    cosine = [Sgd(schedule="cosine").lr_at(epoch * steps, steps) for epoch in (0, 50, 99)]
    assert cosine == pytest.approx([30.0, 15.0, 30 * 0.5 * (1 + np.cos(0.99 * np.pi))])
    assert Sgd(epochs=1).lr_at(0, steps) == 30


def test_every_image_once_per_epoch_in_different_orders() -> None:
    features = torch.arange(23.0)[:, None]
    batches, steps = cached_batches(features, torch.arange(23), Sgd(epochs=3, batch_size=8))
    collected = list(batches)
    assert steps == 3
    assert [len(labels) for _, labels in collected] == [8, 8, 7] * 3
    for rows, labels in collected:
        assert (rows[:, 0] == labels).all()
    orders = [torch.cat([labels for _, labels in collected[e * 3 : e * 3 + 3]]).tolist() for e in range(3)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_normalised_features_have_no_length() -> None:
    """As in lightly's tutorial: with momentum 0 and L2-normalised features, their scale changes nothing."""
    features, labels, _, _ = blobs(200, 1)
    sgd = Sgd(lr=1, epochs=3, momentum=0.0, normalize=True)
    small, large = (trained(scale * features, labels, 7, sgd) for scale in (1e-3, 1e3))
    torch.testing.assert_close(small.weight, large.weight)
    assert not torch.allclose(small.weight, trained(features, labels, 7, Sgd(lr=1, epochs=3, momentum=0.0)).weight)


def test_the_same_seed_gives_the_same_layer() -> None:
    features, labels, _, _ = blobs(100, 1)
    first, again = (trained(features, labels, 7, Sgd(lr=1, epochs=3)) for _ in range(2))
    assert (first.weight == again.weight).all()


def test_a_probe_that_diverges_names_the_flag() -> None:
    with pytest.raises(ConfigError, match="diverged with a learning rate of 1e\\+38: lower --linear-lr"):
        trained(torch.full((8, 2), 1e20), torch.arange(8) % 2, 2, Sgd(lr=1e38, epochs=2))
