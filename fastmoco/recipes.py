"""Named runs, and the values that suit a data set where a setting was left open.

A recipe is a function that returns a RunConfig; its docstring gives the accuracy to expect and where that is from.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from fastmoco.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, RunOptions
from fastmoco.errors import ConfigError


def shapes() -> RunConfig:
    """Ten classes of drawn grey shapes, a quarter-width ResNet-18: kNN 42 → 83 % in two minutes on two CPU cores."""
    # Small batches: 1,000 steps of 32 images teach far more than 250 of 128. Large crops: a small one shows no shape.
    return RunConfig(
        model=ModelConfig(arch="resnet18", width=0.25, moco_k=1024, moco_m=0.99, moco_t=0.1, bn_splits=2),
        optim=OptimConfig(batch_size=32, lr=0.05, wd=5e-4, epochs=8, cos=True),
        augment=AugmentConfig(aug="cifar", crop_scale_min=0.6),
        run=RunOptions(knn_every=2),
    )


def cifar10_demo() -> RunConfig:
    """The authors' CIFAR-10 demo: kNN 82.6, 86.3 and 88.7 % after 200, 400 and 800 epochs (their notebook)."""
    return RunConfig(
        data=DataConfig(data="cifar10"),
        model=ModelConfig(arch="resnet18", stem="cifar", moco_k=4096, moco_m=0.99, moco_t=0.1, bn_splits=8),
        optim=OptimConfig(batch_size=512, lr=0.06, wd=5e-4, epochs=200, cos=True),
        augment=AugmentConfig(aug="cifar", crop_size=32),
    )


def cifar10_demo_symmetric() -> RunConfig:
    """The demo with the symmetric loss: kNN 85.3, 88.5 and 89.7 % after 200, 400 and 800 epochs (their notebook)."""
    return cifar10_demo().replace(symmetric=True)


def imagenet_v1() -> RunConfig:
    """MoCo v1 on a folder of photographs: 60.6 % linear on ImageNet after 200 epochs (He et al. 2020, table 1)."""
    return RunConfig(
        model=ModelConfig(arch="resnet50", stem="imagenet", moco_k=65536, moco_m=0.999, moco_t=0.07, bn_splits=8),
        optim=OptimConfig(batch_size=256, lr=0.03, wd=1e-4, epochs=200, schedule=(120, 160)),
        augment=AugmentConfig(aug="v1", crop_size=224),
    )


def imagenet_v2() -> RunConfig:
    """MoCo v2: 67.5 % linear on ImageNet after 200 epochs, 71.1 % after 800 (Chen et al. 2020, table 1)."""
    return imagenet_v1().replace(aug="v2", mlp=True, moco_t=0.2, cos=True, schedule=None)


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "shapes": shapes,
    "cifar10-demo": cifar10_demo,
    "cifar10-demo-symmetric": cifar10_demo_symmetric,
    "imagenet-v1": imagenet_v1,
    "imagenet-v2": imagenet_v2,
}


def recipe(name: str) -> RunConfig:
    """The configuration of a named recipe. Raises ConfigError with the nearest name."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=1, cutoff=0)
        raise ConfigError(f"unknown recipe {name!r}; did you mean {near[0]!r}? (known: {', '.join(RECIPES)})")
    return RECIPES[name]()
