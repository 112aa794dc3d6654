"""The feature cache returns an entry if and only if weights, images and preprocessing are unchanged."""

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

CPU = torch.device("cpu")
PREPROCESSING = {"side": 32, "mean": (0.5, 0.5, 0.5), "amp": "fp32"}


def test_the_key_depends_on_weights_images_and_preprocessing() -> None:
    keys = {
        key("w", "i", PREPROCESSING),
        key("v", "i", PREPROCESSING),
        key("w", "j", PREPROCESSING),
        key("w", "i", PREPROCESSING | {"side": 33}),
        key("w", "i", PREPROCESSING | {"mean": (0.5, 0.5, 0.4)}),
    }
    assert len(keys) == 5
    assert key("w", "i", PREPROCESSING) == key("w", "i", dict(reversed(PREPROCESSING.items())))


def test_the_weights_hash_depends_on_every_bit() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(4)
    before = weights_hash(layer)
    assert weights_hash(layer) == before
    layer.running_mean[2] += 1e-7  # type: ignore[index]
    changed = weights_hash(layer)
    assert changed != before
    assert weights_hash(nn.BatchNorm1d(5)) not in (before, changed)


def test_the_images_hash_depends_on_the_modification_time(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    fill(folder, "a.png", "b.png")
    before = images_hash(load_dataset(str(folder), data_root=tmp_path).train)
    assert images_hash(load_dataset(str(folder), data_root=tmp_path).train) == before
    path = sorted(folder.rglob("*.png"))[0]
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert images_hash(load_dataset(str(folder), data_root=tmp_path).train) != before


def test_the_images_hash_depends_on_pixels_in_memory_and_their_order() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    index = ImageIndex.from_pixels("a", pixels)
    changed = pixels.copy()
    changed[3, 2, 1, 0] ^= 1
    assert images_hash(index) == images_hash(replace(index, name="b"))
    assert images_hash(ImageIndex.from_pixels("a", changed)) != images_hash(index)
    assert images_hash(index.select(np.arange(5)[::-1])) != images_hash(index)


def test_stored_features_are_loaded(tmp_path: Path) -> None:
    cache, features = FeatureCache(tmp_path / "features"), torch.randn(7, 3)
    assert cache.load("a", 7, 3, CPU) is None
    assert cache.store("a", features) is None
    loaded = cache.load("a", 7, 3, CPU)
    assert loaded is not None
    assert (loaded == features).all()
    assert cache.load("a", 8, 3, CPU) is None
    assert cache.load("b", 7, 3, CPU) is None
    assert [path.name for path in cache.folder.iterdir()] == ["a.safetensors"], "no temporary file is left"


@pytest.mark.parametrize("content", [b"", b"not features", b"\xff" * 200])
def test_a_damaged_entry_is_a_miss_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    cache = FeatureCache(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(content)
    assert cache.load("a", 7, 3, CPU) is None
    assert cache.store("a", torch.zeros(7, 3)) is None
    assert cache.load("a", 7, 3, CPU) is not None


def test_a_failed_write_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    warning = FeatureCache(tmp_path / "file" / "features").store("a", torch.zeros(7, 3))
    assert warning is not None
    assert "extracted again next time" in warning
    monkeypatch.setattr(feature_cache, "_MAX_SHARE_OF_FREE", 0.0)
    warning = FeatureCache(tmp_path / "features").store("a", torch.zeros(7, 3))
    assert warning is not None
    assert "they take 84 bytes" in warning
    assert list((tmp_path / "features").iterdir()) == []


def test_the_least_recently_used_entries_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path)
    for number, name in enumerate("abc"):
        cache.store(name, torch.zeros(100, 10))
        os.utime(tmp_path / f"{name}.safetensors", ns=(number, number))
    assert cache.load("a", 100, 10, CPU) is not None  # used, so newer than b and c
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 3 * (tmp_path / "a.safetensors").stat().st_size)
    cache.store("d", torch.zeros(100, 10))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 1)
    cache.store("e", torch.zeros(100, 10))
    assert [path.stem for path in tmp_path.iterdir()] == ["e"], "the newest entry is kept"
