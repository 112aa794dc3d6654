"""Weighted kNN against a simple brute-force implementation, scikit-learn and hand-computed values."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from fastmoco.evaluation import knn
from fastmoco.evaluation.knn import knn_accuracy, knn_classify, knn_votes


def brute_force(bank: list, labels: list, query: list, k: int, temperature: float) -> int:
    """Plain Python in float64: sort all similarities, the first k vote, ties go to the lowest label."""

    def cosine(a: list, b: list) -> float:
        lengths = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0

    nearest = sorted(((cosine(query, row), label) for row, label in zip(bank, labels, strict=True)), reverse=True)[:k]
    votes: dict[int, float] = defaultdict(float)
    for similarity, label in nearest:
        votes[label] += math.exp(similarity / temperature)
    return min(votes, key=lambda label: (-votes[label], label))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 12),
    k=st.integers(1, 60),
    temperature=st.sampled_from([0.02, 0.1, 1.0]),
    seed=st.integers(0, 10**6),
    chunk_bytes=st.sampled_from([1, 1000, 2**28]),
)
def test_agrees_with_brute_force(n: int, m: int, k: int, temperature: float, seed: int, chunk_bytes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(n, 7, generator=generator, dtype=torch.float64) * 5
    queries = torch.randn(m, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (n,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_CHUNK_BYTES", chunk_bytes)
        predicted = knn_classify(bank, labels, queries, k=k, temperature=temperature, num_classes=4)
    expected = [brute_force(bank.tolist(), labels.tolist(), query, k, temperature) for query in queries.tolist()]
    assert predicted.tolist() == expected


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.07), (200, 0.1), (200, 1.0)])
def test_agrees_with_scikit_learn_to_a_tenth_of_a_point(k: int, temperature: float) -> None:
    """KNeighborsClassifier on cosine distance, with the same votes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 10
    features = 0.6 * torch.randn(10, 32, generator=generator)[labels] + torch.randn(4000, 32, generator=generator)
    features = features.relu()
    bank, queries, query_labels = features[:3000], features[3000:], labels[3000:]
    votes_of: Any = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731 - the stubs lack callables
    reference = KNeighborsClassifier(k, weights=votes_of, metric="cosine", algorithm="brute")
    reference.fit(bank.numpy(), labels[:3000])
    accuracy = knn_accuracy(bank, labels[:3000], queries, query_labels, k=k, temperature=temperature, num_classes=10)
    assert 30 < accuracy < 95, "the task is neither trivial nor impossible"
    assert accuracy == pytest.approx(100 * reference.score(queries.numpy(), query_labels.numpy()), abs=0.1)
    votes = knn_votes(bank, labels[:3000], queries, k=k, temperature=temperature, num_classes=10)
    probabilities = torch.from_numpy(reference.predict_proba(queries.numpy())).float()
    torch.testing.assert_close(votes / votes.sum(1, keepdim=True), probabilities, rtol=0, atol=1e-4)


def test_near_neighbours_outvote_far_ones_at_low_temperature() -> None:
    """One neighbour of class 0 at similarity 1, two of class 1 at 0.8: 1 vote against 2 exp(-0.2 / T)."""
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[3.0, 0.0]])
    limit = 0.2 / math.log(2)  # of equal votes
    assert knn_classify(bank, labels, query, temperature=0.99 * limit, num_classes=2).item() == 0
    assert knn_classify(bank, labels, query, temperature=1.01 * limit, num_classes=2).item() == 1
    assert knn_classify(bank, labels, query, k=1, temperature=1.0, num_classes=2).item() == 0


def test_ties_go_to_the_lowest_class() -> None:
    bank = torch.eye(4)
    assert knn_classify(bank, torch.tensor([3, 2, 1, 0]), torch.ones(5, 4), num_classes=6).tolist() == [0] * 5


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_neither_overflow_nor_underflow(temperature: float) -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    predicted = knn_classify(bank, torch.tensor([1, 2, 2]), bank[:1], temperature=temperature, num_classes=3)
    assert predicted.item() == (1 if temperature < 1 else 2)


def test_similarities_are_float32_under_autocast() -> None:
    features = torch.randn(600, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(600) % 10
    expected = knn_classify(features.double(), labels, features.double(), k=20, num_classes=10)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = knn_classify(features, labels, features, k=20, num_classes=10)
    assert (predicted == expected).float().mean() > 0.99


def test_accuracy_is_a_percentage() -> None:
    bank, labels = torch.eye(4), torch.arange(4)
    query_labels = torch.tensor([0, 1, 2, 0])
    assert knn_accuracy(bank, labels, bank, query_labels, k=1, num_classes=4) == 75.0


@pytest.mark.parametrize(
    ("bank", "labels", "k", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3), 1, r"\(N, D\)"),
        (torch.zeros(3, 4), torch.zeros(2), 1, r"\(N, D\)"),
        (torch.zeros(0, 4), torch.zeros(0), 1, "images in the bank"),
        (torch.zeros(3, 4), torch.zeros(3), 0, "above 0"),
        (torch.zeros(3, 4), torch.tensor([0, 1, 5]), 1, "between 0 and 5, expected 0 to 4"),
        (torch.zeros(3, 4), torch.tensor([0, -1, 1]), 1, "between -1 and 1"),
    ],
)
def test_invalid_arguments_are_rejected(bank: torch.Tensor, labels: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn_classify(bank, labels.long(), torch.zeros(1, 4), k=k, num_classes=5)
