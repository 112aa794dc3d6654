"""Features kept on disk: found when everything is as it was, and only then."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastmoco.evaluation import cache as feature_cache
from fastmoco.evaluation.cache import FeatureCache, images_hash, key, weights_hash
from pipelines.data.dataset import load_dataset
from pipelines.data.index import ImageIndex
from tests.oddities import fill

HOW = {"side": 32, "mean": (0.5, 0.5, 0.5), "amp": "fp32"}


def test_the_name_depends_on_everything() -> None:
    names = {
        key("w", "i", HOW),
        key("v", "i", HOW),
        key("w", "j", HOW),
        key("w", "i", HOW | {"side": 33}),
        key("w", "i", HOW | {"mean": (0.5, 0.5, 0.4)}),
    }
    assert len(names) == 5
    assert key("w", "i", HOW) == key("w", "i", dict(reversed(HOW.items())))


def test_any_bit_of_the_weights_counts() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(4)
    before = weights_hash(layer)
    assert weights_hash(layer) == before
    layer.running_mean[2] += 1e-7  # type: ignore[index]
    moved = weights_hash(layer)
    assert moved != before
    assert weights_hash(nn.BatchNorm1d(5)) not in (before, moved)


def test_a_file_that_changed_counts_though_its_name_and_size_did_not(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    fill(folder, "a.png", "b.png")
    before = images_hash(load_dataset(str(folder), data_root=tmp_path).train)
    assert images_hash(load_dataset(str(folder), data_root=tmp_path).train) == before
    path = sorted(folder.rglob("*.png"))[0]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert images_hash(load_dataset(str(folder), data_root=tmp_path).train) != before


def test_pixels_in_memory_and_their_order_count() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    index = ImageIndex.from_pixels("a", pixels)
    changed = pixels.copy()
    changed[3, 2, 1, 0] ^= 1
    assert images_hash(index) == images_hash(replace(index, name="b"))
    assert images_hash(ImageIndex.from_pixels("a", changed)) != images_hash(index)
    assert images_hash(index.select(np.arange(5)[::-1])) != images_hash(index)


def test_what_was_stored_comes_back(tmp_path: Path) -> None:
    cache, features = FeatureCache(tmp_path / "features"), torch.randn(7, 3)
    assert cache.load("a", 7, 3) is None
    assert cache.store("a", features) is None
    found = cache.load("a", 7, 3)
    assert found is not None
    assert (found == features).all()
    assert cache.load("a", 8, 3) is None
    assert cache.load("b", 7, 3) is None
    assert [path.name for path in cache.folder.iterdir()] == ["a.safetensors"], "no temporary file is left"


@pytest.mark.parametrize("content", [b"", b"not features", b"\xff" * 200])
def test_a_damaged_file_is_not_there(tmp_path: Path, content: bytes) -> None:
    cache = FeatureCache(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(content)
    assert cache.load("a", 7, 3) is None
    assert cache.store("a", torch.zeros(7, 3)) is None
    assert cache.load("a", 7, 3) is not None


def test_a_disk_that_refuses_is_said_and_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    said = FeatureCache(tmp_path / "file" / "features").store("a", torch.zeros(7, 3))
    assert said is not None
    assert "extracted again next time" in said
    monkeypatch.setattr(feature_cache, "_FREE_SHARE", 0.0)
    said = FeatureCache(tmp_path / "features").store("a", torch.zeros(7, 3))
    assert said is not None
    assert "they take 84 bytes" in said
    assert list((tmp_path / "features").iterdir()) == []


def test_the_least_recently_used_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path)
    for number, name in enumerate("abc"):
        cache.store(name, torch.zeros(100, 10))
        os.utime(tmp_path / f"{name}.safetensors", ns=(number, number))
    assert cache.load("a", 100, 10) is not None  # used, so newer than b and c
    monkeypatch.setattr(feature_cache, "MOST_BYTES", 3 * (tmp_path / "a.safetensors").stat().st_size)
    cache.store("d", torch.zeros(100, 10))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]
    monkeypatch.setattr(feature_cache, "MOST_BYTES", 1)
    cache.store("e", torch.zeros(100, 10))
    assert [path.stem for path in tmp_path.iterdir()] == ["e"], "what was just written stays"
