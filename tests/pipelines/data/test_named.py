"""Data sets by name: conversion of torchvision's arrays and folders, without downloads."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import datasets

from pipelines.data import named
from pipelines.data.dataset import load_dataset
from pipelines.errors import DataError
from tests.oddities import fill


@pytest.fixture
def load(tmp_path):
    """load(data, ...) with named data sets in the test's own folder."""
    return lambda data, **options: load_dataset(data, data_root=tmp_path / "downloads", **options)


def test_shapes(load):
    dataset = load("shapes", limit=100)
    assert (len(dataset.train), len(dataset.test)) == (100, 100)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), [10] * 10)
    assert dataset.train.read(0).shape == (32, 32, 3)
    assert dataset.bank is dataset.train
    assert dataset.train.describe() == "shapes/train: 100 images of 32×32 (width×height), 10 classes, in memory"


def test_cifar_comes_through_torchvision(load, tmp_path, monkeypatch):
    def fake(root, train, download):
        assert (root, download) == (str(tmp_path / "downloads"), True)
        pixels = np.full((6 if train else 4, 32, 32, 3), 7, np.uint8)
        return SimpleNamespace(data=pixels, targets=[i % 2 for i in range(len(pixels))], classes=["cat", "dog"])

    monkeypatch.setattr(datasets, "CIFAR10", fake)
    dataset = load("cifar10")
    assert dataset.train.describe() == "cifar10/train: 6 images of 32×32 (width×height), 2 classes, in memory"
    assert len(dataset.test) == 4
    np.testing.assert_array_equal(dataset.train.labels, [0, 1, 0, 1, 0, 1])


def test_stl10_pretrains_on_all_images_and_its_bank_is_labelled(load, monkeypatch):
    def fake(root, split, download):
        count, value = {"train": (3, 1), "test": (4, 2), "unlabeled": (5, 3)}[split]
        planes = np.full((count, 3, 96, 96), value, np.uint8)
        planes[:, 0, :, 5] = 99  # red, sixth column
        return SimpleNamespace(data=planes, labels=np.zeros(count, np.int64), classes=["bird"])

    monkeypatch.setattr(datasets, "STL10", fake)
    dataset = load("stl10")
    assert (len(dataset.train), len(dataset.test), len(dataset.bank)) == (8, 4, 3)
    assert dataset.train.labels is None
    assert dataset.bank.labels is not None
    assert dataset.train.read(7)[40, :7].tolist() == [[3, 3, 3]] * 5 + [[99, 3, 3], [3, 3, 3]]


def test_grey_digits_become_rgb_and_emnist_is_upright(load, monkeypatch):
    digits = torch.zeros(2, 28, 28, dtype=torch.uint8)
    digits[:, 3, 20] = 200
    fake = SimpleNamespace(data=digits, targets=torch.tensor([0, 1]), classes=["0", "1"])
    monkeypatch.setattr(datasets, "MNIST", lambda root, train, download: fake)
    monkeypatch.setattr(datasets, "EMNIST", lambda root, train, split, download: fake)
    assert load("mnist").train.read(1)[3, 20].tolist() == [200, 200, 200]
    assert load("emnist").train.read(1)[20, 3].tolist() == [200, 200, 200]


def test_a_partly_unpacked_imagenette_is_refused(load, tmp_path, monkeypatch):
    folder = fill(
        tmp_path / "downloads" / "imagenette2", "train/n1/a.png", "train/n2/a.png", "val/n1/a.png", "val/n2/b.png"
    )
    fake = SimpleNamespace(classes=[("tench", "Tinca tinca"), ("springer",)])
    monkeypatch.setattr(datasets, "Imagenette", lambda root, split, size, download: fake)
    with pytest.raises(
        DataError, match=r"holds 2 files, expected 9,469: unpacking was interrupted; delete .*imagenette2"
    ):
        load("imagenette")
    monkeypatch.setattr(named, "IMAGENETTE_COUNTS", {"train": 2, "val": 2})
    dataset = load("imagenette")
    assert dataset.test.paths == (str(folder / "val/n1/a.png"), str(folder / "val/n2/b.png"))
    assert dataset.train.class_names == dataset.bank.class_names == ("tench", "springer")


def test_a_failed_download_names_the_remedy(load, monkeypatch):
    def fail(root, **options):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(datasets, "CIFAR100", fail)
    with pytest.raises(DataError, match=r"CIFAR100 is not in .*downloads and .*corrupted\..*; check the network"):
        load("cifar100")
