"""Recipes for images of 28 and 32 pixels: at most an hour on one GPU."""

from __future__ import annotations

from fastmoco.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, RunOptions
from fastmoco.recipes.entry import Expected, Measured, Recipe

_NOTEBOOK = "the authors' notebook, moco_cifar10_demo"
_CIFAR = "CIFAR-10, downloaded by name"
_KNN = "kNN on the 128-d output, k 200, T 0.1"
_LIGHTLY = "linear on L2-normalised features, SGD without momentum"
_STUDY = "the reproduction study's settings"


def shapes() -> Recipe:
    """Ten classes of drawn grey shapes with a quarter-width ResNet-18: one to three minutes on two CPU cores."""
    # Small batches: 1,250 steps of 16 images are as good as 1,375 of 32. Large crops: a small one shows no shape.
    return Recipe(
        config=RunConfig(
            model=ModelConfig(arch="resnet18", width=0.25, moco_k=512, moco_m=0.99, moco_t=0.1, bn_splits=1),
            optim=OptimConfig(batch_size=16, lr=0.03, wd=5e-4, epochs=5, cos=True),
            augment=AugmentConfig(aug="cifar", crop_scale_min=0.7),
            run=RunOptions(knn_every=2),
        ),
        data="drawn in memory",
        unknown="Our own: no accuracy is published. Raw pixels have 48.4 %, the untrained encoder 41.8 %.",
        measured=(
            Measured(
                "kNN on features, k 200, T 0.1",
                82.9,
                "5 epochs, under two minutes on two CPU cores, seed 0; 79 to 88 by rounding",
            ),
        ),
    )


def cifar10_demo() -> Recipe:
    """The authors' CIFAR-10 demo."""
    return Recipe(
        config=RunConfig(
            data=DataConfig(data=("cifar10",)),
            model=ModelConfig(
                arch="resnet18",
                stem="cifar",
                stem_init="torch",
                moco_k=4096,
                moco_m=0.99,
                moco_t=0.1,
                bn_splits=8,
            ),
            optim=OptimConfig(batch_size=512, lr=0.06, wd=5e-4, epochs=200, cos=True, first_epoch=1),
            augment=AugmentConfig(aug="cifar", crop_size=32),
        ),
        data=_CIFAR,
        expected=(
            Expected(f"{_KNN}, 200 epochs", 82.6, _NOTEBOOK),
            Expected(f"{_KNN}, 400 epochs", 86.3, _NOTEBOOK, "--epochs 400"),
            Expected(f"{_KNN}, 800 epochs", 88.7, _NOTEBOOK, "--epochs 800"),
        ),
        evaluate="--probes knn --knn-on output",
    )


def cifar10_demo_symmetric() -> Recipe:
    """The demo with the symmetric loss."""
    return Recipe(
        config=cifar10_demo().config.replace(symmetric=True),
        data=_CIFAR,
        expected=(
            Expected(f"{_KNN}, 200 epochs", 85.3, _NOTEBOOK),
            Expected(f"{_KNN}, 400 epochs", 88.5, _NOTEBOOK, "--epochs 400"),
            Expected(f"{_KNN}, 800 epochs", 89.7, _NOTEBOOK, "--epochs 800"),
        ),
        evaluate="--probes knn --knn-on output",
    )


def cifar10_mlp() -> Recipe:
    """The lightly tutorial: the demo with an MLP head, evaluated by a linear classifier."""
    source = "lightly's tutorial 2, Train MoCo on CIFAR-10"
    return Recipe(
        config=cifar10_demo().config.replace(head=(512,), epochs=100, first_epoch=0, normalization="imagenet"),
        data=_CIFAR,
        expected=(
            Expected(f"{_LIGHTLY}, 100 epochs, about", 73.0, source),
            Expected(f"{_LIGHTLY}, 200 epochs, about", 80.0, source, "--epochs 200"),
        ),
        evaluate="--probes linear --linear-lr 30 --linear-momentum 0 --linear-normalize --linear-epochs 100 "
        "--linear-schedule cosine --linear-batch-size 512 --linear-views padded",
    )


def byol_aug() -> Recipe:
    """MoCo with BYOL's augmentation, including solarisation, and a high learning rate."""
    return Recipe(
        config=cifar10_demo().config.replace(aug="byol", batch_size=256, lr=0.2, moco_t=0.1),
        data=_CIFAR,
        unknown="From study notes that give batch, learning rate, temperature and augmentation; the rest is as in the "
        "CIFAR-10 demo, and no accuracy is known.",
    )


def mnist() -> Recipe:
    """The reproduction study on MNIST, in grey; also with --arch resnet50."""
    return Recipe(config=_study("mnist"), data="MNIST, downloaded by name", unknown=_unspecified("ResNet-18"))


def emnist() -> Recipe:
    """The reproduction study on EMNIST by class, 62 letters and digits in grey; also with --arch resnet50."""
    return Recipe(
        config=_study("emnist-byclass").replace(epochs=20),
        data="EMNIST by class, downloaded by name (1.6 GB of memory)",
        unknown=_unspecified("ResNet-18", 20),
    )


def _study(data: str) -> RunConfig:
    return RunConfig(
        data=DataConfig(data=(data,)),
        model=ModelConfig(arch="resnet18", stem="cifar", moco_k=4096, moco_m=0.9, moco_t=0.07, bn_splits=8),
        optim=OptimConfig(batch_size=128, lr=0.03, wd=1e-4, epochs=100, cos=True),
        augment=AugmentConfig(aug="v1", crop_size=28),
    )


def _unspecified(arch: str, epochs: int = 100) -> str:
    return (
        f"{_STUDY[0].upper()}{_STUDY[1:]}: batch, queue, momentum, learning rate, weight decay and temperature. The "
        f"{epochs} epochs with a cosine schedule and the 3×3 stem of the {arch} are ours, and no accuracy is known."
    )
