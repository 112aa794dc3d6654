"""Stratified label draws, and the mean and standard deviation over them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmoco.errors import ConfigError
from fastmoco.evaluation.few_label import draw_labelled, few_label
from fastmoco.evaluation.settings import Amount
from pipelines.errors import DataError
from tests.evaluation.test_logistic import blobs

NAMES = ("cat", "dog", "eel")
LABELS = np.repeat([0, 1, 2], [100, 40, 20])


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("10%", (10, 4, 2)),
        ("2.5%", (3, 1, 1)),
        ("100%", (100, 40, 20)),
        ("5-per-class", (5, 5, 5)),
        ("20-per-class", (20,) * 3),
    ],
)
def test_draws_are_stratified_and_without_repetition(text: str, counts: tuple[int, ...]) -> None:
    rows = draw_labelled(LABELS, Amount.parse(text), NAMES, seed=0)
    assert len(set(rows.tolist())) == len(rows)
    assert tuple(np.bincount(LABELS[rows]).tolist()) == counts


def test_draws_are_a_function_of_the_seed() -> None:
    first, again, other = (draw_labelled(LABELS, Amount.parse("10%"), NAMES, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("21-per-class", "the class 'eel' has 20 labelled images, fewer than requested: use 20-per-class"),
        ("1%", "the class 'dog' has 40 labelled images, and the percentage rounds to 0: use 1-per-class"),
    ],
)
def test_a_class_with_too_few_images_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        draw_labelled(LABELS, Amount.parse(text), NAMES, seed=0)


@pytest.mark.parametrize("text", ["", "0%", "101%", "-1%", "5", "0-per-class", "1.5-per-class", "ten%"])
def test_invalid_amounts_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a percentage such as 1% or 10%"):
        Amount.parse(text)


def test_more_labels_give_higher_accuracy_and_less_variance() -> None:
    features, labels, queries, query_labels = blobs(700, 1000)
    names = tuple(map(str, range(7)))

    def probe(text: str, seeds: int):
        amount = Amount.parse(text)
        draws = [draw_labelled(labels.numpy(), amount, names, seed) for seed in range(seeds)]
        return few_label(features, labels, queries, query_labels, draws, amount, 7)

    few, many = probe("1-per-class", 5), probe("50-per-class", 5)
    assert (few.labels, many.labels) == (7, 350)
    assert many.top1_percent > few.top1_percent + 10
    assert few.top1_percent == pytest.approx(np.mean(few.each_percent))
    assert few.spread_percent == pytest.approx(np.std(few.each_percent, ddof=1))
    assert few.spread_percent is not None
    assert many.spread_percent is not None
    assert many.spread_percent < few.spread_percent
    assert probe("5-per-class", 1).spread_percent is None


def test_only_the_drawn_labels_are_used() -> None:
    """Wrong labels of other images have no effect."""
    features, labels, queries, query_labels = blobs(200, 200)
    amount, names = Amount.parse("5-per-class"), tuple(map(str, range(7)))
    draws = [draw_labelled(labels.numpy(), amount, names, 0)]
    corrupted = torch.zeros_like(labels)
    corrupted[draws[0]] = labels[draws[0]]
    expected = few_label(features, labels, queries, query_labels, draws, amount, 7)
    assert few_label(features, corrupted, queries, query_labels, draws, amount, 7) == expected
