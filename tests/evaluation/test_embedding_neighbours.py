"""Neighbours and near-duplicates in blocks are those of all similarities at once."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from fastmoco.evaluation import neighbours
from fastmoco.evaluation.neighbours import duplicate_groups, nearest, similarity_blocks

CPU, SILENT = torch.device("cpu"), Console(file=io.StringIO())


def random_features(count: int, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)


def cosines(features: np.ndarray) -> np.ndarray:
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize(("bank_rows", "block_bytes"), [(None, 2**26), (7, 2**26), (7, 100), (1, 4), (50, 4 * 50 * 3)])
def test_nearest_are_those_of_all_similarities(
    bank_rows: int | None, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", block_bytes)
    features = random_features(50)
    rows, similarity = nearest(features, 4, CPU, SILENT, bank_rows)
    expected = cosines(features)
    np.fill_diagonal(expected, -np.inf)
    order = np.argsort(-expected, axis=1)[:, :4]
    assert (rows == order).all()
    np.testing.assert_allclose(similarity, np.take_along_axis(expected, order, axis=1), atol=1e-6)


def test_no_block_is_larger_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", 400)
    blocks = list(similarity_blocks(random_features(33), CPU, bank_rows=10))
    assert max(block.similarity.numel() * 4 for block in blocks) <= 400
    assert sum(block.similarity.numel() for block in blocks) == 33 * 33


def test_fewer_images_than_neighbours() -> None:
    rows, similarity = nearest(np.array([[1.0, 0.0], [2.0, 0.0]], dtype=np.float32), 5, CPU, SILENT)
    assert rows.tolist() == [[1], [0]]
    assert similarity.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("max_pairs", [4_000_000, 1])
@pytest.mark.parametrize("bank_rows", [None, 3])
def test_groups_are_joined_over_images_in_between(
    max_pairs: int, bank_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_MAX_PAIRS", max_pairs)
    degrees = np.array([0, 90, 4, 200, 8, 93, 270, 12])  # a chain of steps of 4°, and a pair 3° apart
    angles = np.radians(degrees)
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * 7
    groups = duplicate_groups(features, np.cos(np.radians(4.5)), CPU, SILENT, bank_rows)
    assert [group.tolist() for group in groups] == [[0, 2, 4, 7], [1, 5]]
    assert duplicate_groups(features, np.cos(np.radians(2)), CPU, SILENT, bank_rows) == []


def test_copies_are_found_at_a_similarity_of_one() -> None:
    features = random_features(40, dim=33)
    features[31] = 3 * features[2]
    groups = duplicate_groups(features, 1.0, CPU, SILENT)
    assert [group.tolist() for group in groups] == [[2, 31]]


def test_a_collapsed_backbone_is_one_group() -> None:
    """All pairs are joined, many times over the pairs that are kept at once."""
    features = np.ones((300, 4), dtype=np.float32)
    (group,) = duplicate_groups(features, 0.99, CPU, SILENT, bank_rows=64)
    assert group.tolist() == list(range(300))
