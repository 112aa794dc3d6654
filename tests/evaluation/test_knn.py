"""Weighted kNN against a brute force that anyone can read, and by hand."""

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
    """Plain Python in float64: sort all similarities, let the first k vote, the lowest label wins a tie."""

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
        found = knn_classify(bank, labels, queries, k=k, temperature=temperature, num_classes=4)
    wanted = [brute_force(bank.tolist(), labels.tolist(), query, k, temperature) for query in queries.tolist()]
    assert found.tolist() == wanted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.07), (200, 0.1), (200, 1.0)])
def test_agrees_with_scikit_learn_to_a_tenth_of_a_point(k: int, temperature: float) -> None:
    """KNeighborsClassifier on cosine distance, with the same votes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 10
    features = 0.6 * torch.randn(10, 32, generator=generator)[labels] + torch.randn(4000, 32, generator=generator)
    features = features.relu()
    bank, queries, asked = features[:3000], features[3000:], labels[3000:]
    votes_of: Any = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731 - their stubs know names alone
    theirs = KNeighborsClassifier(k, weights=votes_of, metric="cosine", algorithm="brute")
    theirs.fit(bank.numpy(), labels[:3000])
    accuracy = knn_accuracy(bank, labels[:3000], queries, asked, k=k, temperature=temperature, num_classes=10)
    assert 30 < accuracy < 95, "a task on which classifiers differ"
    assert accuracy == pytest.approx(100 * theirs.score(queries.numpy(), asked.numpy()), abs=0.1)
    votes = knn_votes(bank, labels[:3000], queries, k=k, temperature=temperature, num_classes=10)
    shares = torch.from_numpy(theirs.predict_proba(queries.numpy())).float()
    torch.testing.assert_close(votes / votes.sum(1, keepdim=True), shares, rtol=0, atol=1e-4)


def test_near_neighbours_outvote_far_ones_as_the_temperature_falls() -> None:
    """By hand: one neighbour of class 0 at similarity 1, two of class 1 at 0.8; 1 vote against 2 exp(-0.2 / T)."""
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[3.0, 0.0]])
    limit = 0.2 / math.log(2)  # both classes have as many votes
    assert knn_classify(bank, labels, query, temperature=0.99 * limit, num_classes=2).item() == 0
    assert knn_classify(bank, labels, query, temperature=1.01 * limit, num_classes=2).item() == 1
    assert knn_classify(bank, labels, query, k=1, temperature=1.0, num_classes=2).item() == 0


def test_of_equal_votes_the_lowest_class_wins() -> None:
    bank = torch.eye(4)
    assert knn_classify(bank, torch.tensor([3, 2, 1, 0]), torch.ones(5, 4), num_classes=6).tolist() == [0] * 5


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_neither_overflow_nor_lose_the_votes(temperature: float) -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    found = knn_classify(bank, torch.tensor([1, 2, 2]), bank[:1], temperature=temperature, num_classes=3)
    assert found.item() == (1 if temperature < 1 else 2)


def test_half_precision_features_and_autocast_are_compared_in_full_precision() -> None:
    features = torch.randn(600, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(600) % 10
    wanted = knn_classify(features.double(), labels, features.double(), k=20, num_classes=10)
    with torch.autocast("cpu", torch.bfloat16):
        found = knn_classify(features, labels, features, k=20, num_classes=10)
    assert (found == wanted).float().mean() > 0.99


def test_accuracy_is_a_percentage() -> None:
    bank, labels = torch.eye(4), torch.arange(4)
    asked = torch.tensor([0, 1, 2, 0])
    assert knn_accuracy(bank, labels, bank, asked, k=1, num_classes=4) == 75.0


@pytest.mark.parametrize(
    ("bank", "labels", "k", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(3), 1, r"\(N, D\)"),
        (torch.zeros(3, 4), torch.zeros(2), 1, r"\(N, D\)"),
        (torch.zeros(0, 4), torch.zeros(0), 1, "images in the bank"),
        (torch.zeros(3, 4), torch.zeros(3), 0, "above 0"),
        (torch.zeros(3, 4), torch.tensor([0, 1, 5]), 1, "between 0 and 5, expected 0 to 4"),
        (torch.zeros(3, 4), torch.tensor([0, -1, 1]), 1, "between -1 and 1"),
    ],
)
def test_what_cannot_be_classified_is_refused(bank: torch.Tensor, labels: torch.Tensor, k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        knn_classify(bank, labels.long(), torch.zeros(1, 4), k=k, num_classes=5)
