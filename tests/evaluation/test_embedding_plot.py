"""The embedding plot keeps clusters together, is deterministic, and is drawn with and without labels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.errors import ConfigError
from fastmoco.evaluation.embedding_plot import MIN_POINTS, Thumbnails, draw, project, spaced
from fastmoco.evaluation.options import check_method


def clouds(count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Three distant clusters on the sphere, with features of random norm, which must not matter."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    features = torch.eye(3, 16)[labels] + 0.05 * torch.randn(count, 16, generator=generator)
    return features * (1 + 50 * torch.rand(count, 1, generator=generator)), labels.numpy()


def test_neighbours_are_of_the_same_cluster() -> None:
    features, labels = clouds(60)
    points = project(features)
    assert points.shape == (60, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).all()
    assert (points == project(features)).all(), "deterministic for a seed"


@pytest.mark.parametrize("features", [torch.ones(MIN_POINTS, 4), torch.zeros(9, 3), torch.eye(MIN_POINTS)])
def test_few_or_equal_points_are_projected(features: torch.Tensor) -> None:
    points = project(features)
    assert points.shape == (len(features), 2)
    assert np.isfinite(points).all()


@pytest.mark.parametrize(("classes", "labelled"), [(3, True), (12, True), (200, True), (0, False)])
def test_points_are_coloured_by_class(tmp_path: Path, classes: int, labelled: bool) -> None:
    points = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    names = tuple(f"_name$ {i}" for i in range(classes))
    draw(points, np.arange(400) % classes if labelled else None, names, "title", tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    coloured = pixels[(pixels.max(1) - pixels.min(1)) > 60]
    hues = {tuple(colour) for colour in (coloured // 64).tolist()}
    assert len(coloured) > 1_000
    assert len(hues) >= (6 if classes > 10 else 3 if classes else 1)


def test_points_with_thumbnails_are_spread_and_do_not_overlap() -> None:
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(0, 0.01, (500, 2)), [[10, 0], [0, 10], [-10, -10]]]).astype(np.float32)
    chosen = spaced(points)
    assert {500, 501, 502} < set(chosen.tolist())
    assert len(chosen) == 4, "one of the 500 that lie together"
    assert len(spaced(generator.uniform(size=(1000, 2)), count=20)) == 20
    assert spaced(np.zeros((7, 2))).tolist() == [0]


def test_images_are_drawn_where_there_are_no_labels(tmp_path: Path) -> None:
    points = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)
    pixels = np.full((2, 8, 8, 3), (250, 120, 10), np.uint8)
    draw(points, None, (), "title", tmp_path / "m.png", Thumbnails(np.array([0, 3]), pixels, ["a$.jpg", "b" * 99]))
    with Image.open(tmp_path / "m.png") as image:
        found = np.argwhere((np.asarray(image.convert("RGB")) == (250, 120, 10)).all(-1))
    assert len(found) == pytest.approx(2 * 56 * 56, rel=0.1)
    top_right, bottom_left = found[found[:, 1] > found[:, 1].mean()], found[found[:, 1] < found[:, 1].mean()]
    assert top_right[:, 0].max() < bottom_left[:, 0].min()


@pytest.mark.skipif(importlib.util.find_spec("umap") is not None, reason="umap is installed")
def test_a_missing_umap_package_is_named() -> None:
    with pytest.raises(ConfigError, match="pip install umap-learn, or --map tsne"):
        check_method("umap")
