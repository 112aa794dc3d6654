"""Recipes for photographs: Imagenette and Imagewoof take minutes to hours on one GPU, ImageNet days."""

from __future__ import annotations

from fastmoco.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastmoco.recipes.entry import Expected, Recipe

_V1 = "He et al. 2020, table 1"
_V2 = "Chen et al. 2020, table 1"
_BLOG = "MoCo-v2 in PyTorch, a blog of Analytics Vidhya, 2020"
_IMAGENETTE = "Imagenette, downloaded by name"
_IMAGENET = "ImageNet-1k (image-net.org), train/ and val/ with one folder per class, in ./imagenet or --data"
_LINEAR = "--probes linear --linear-lr 30 --linear-epochs 100 --linear-schedule step --linear-views resized"
_PROTOCOL = "linear on features, lr 30, 100 epochs of random resized crops"
_FEW_LABELS = "linear on features with 10 % of the labels"
_FEW = "--probes few-label --labels 10%"


def imagenet_v1() -> Recipe:
    """MoCo v1 on ImageNet."""
    return Recipe(
        config=RunConfig(
            data=DataConfig(data=("imagenet",)),
            model=ModelConfig(arch="resnet50", stem="imagenet", moco_k=65536, moco_m=0.999, moco_t=0.07, bn_splits=8),
            optim=OptimConfig(batch_size=256, lr=0.03, wd=1e-4, epochs=200, schedule=(120, 160)),
            augment=AugmentConfig(aug="v1", crop_size=224),
        ),
        data=_IMAGENET,
        expected=(Expected(f"{_PROTOCOL}, 200 epochs", 60.6, _V1),),
        evaluate=_LINEAR,
    )


def imagenet_v1_wide2() -> Recipe:
    """MoCo v1 with a ResNet-50 twice as wide."""
    return _variant(65.4, width=2.0)


def imagenet_v1_wide4() -> Recipe:
    """MoCo v1 with a ResNet-50 four times as wide."""
    return _variant(68.6, width=4.0)


def imagenet_v1_resnext50() -> Recipe:
    """MoCo v1 with ResNeXt-50 32×8d."""
    return _variant(63.9, arch="resnext50_32x8d")


def imagenet_v2() -> Recipe:
    """MoCo v2 on ImageNet."""
    return Recipe(
        config=imagenet_v1().config.replace(aug="v2", mlp=True, moco_t=0.2, cos=True, schedule=None),
        data=_IMAGENET,
        expected=(Expected(f"{_PROTOCOL}, 200 epochs", 67.5, _V2),),
        evaluate=_LINEAR,
    )


def imagenet_v2_800() -> Recipe:
    """MoCo v2 on ImageNet, four times as long."""
    return Recipe(
        config=imagenet_v2().config.replace(epochs=800),
        data=_IMAGENET,
        expected=(Expected(f"{_PROTOCOL}, 800 epochs", 71.1, _V2),),
        evaluate=_LINEAR,
    )


def imagenet_mini() -> Recipe:
    """The reproduction study on 1,000 classes of about 35 images, in grey; also with --arch resnet50."""
    return Recipe(
        config=RunConfig(
            data=DataConfig(data=("imagenet-mini",)),
            model=ModelConfig(arch="resnet18", stem="imagenet", moco_k=4096, moco_m=0.9, moco_t=0.07, bn_splits=8),
            optim=OptimConfig(batch_size=128, lr=0.03, wd=1e-4, epochs=100, cos=True),
            augment=AugmentConfig(aug="v1", crop_size=224),
        ),
        data="ImageNet 1000 (mini) of Kaggle (ifigotin/imagenetmini-1000) in ./imagenet-mini or --data, converted "
        "to grey as in the study: find imagenet-mini -name '*.JPEG' -exec mogrify -colorspace Gray {} +",
        unknown="The reproduction study's settings: batch, queue, momentum, learning rate, weight decay and "
        "temperature. The 100 epochs with a cosine schedule are ours, and no accuracy is known.",
    )


def imagenette_blog() -> Recipe:
    """MoCo v2 with ResNet-18 on Imagenette, evaluated with 10 % of the labels."""
    return Recipe(
        config=RunConfig(
            data=DataConfig(data=("imagenette",)),
            model=ModelConfig(
                arch="resnet18",
                stem="imagenet",
                head=(100, 50),
                moco_dim=25,
                moco_k=8192,
                moco_m=0.999,
                moco_t=0.05,
                bn_splits=8,
            ),
            optim=OptimConfig(batch_size=256, lr=1e-3, final_lr=1e-5, wd=1e-6, epochs=500, cos=True),
            augment=AugmentConfig(aug="v2", crop_size=224),
        ),
        data=_IMAGENETTE,
        expected=(Expected(_FEW_LABELS, 64.2, _BLOG),),
        unknown="The number of epochs and the momentum of the key encoder, 500 and 0.999 here, are not known.",
        evaluate=_FEW,
    )


def imagewoof_blog() -> Recipe:
    """The same on Imagewoof, ten breeds of dogs."""
    blog = imagenette_blog()
    return Recipe(
        config=blog.config.replace(data=("imagewoof2",)),
        data="Imagewoof: unpack imagewoof2.tgz of fast.ai (github.com/fastai/imagenette) here, or --data",
        expected=(Expected(_FEW_LABELS, 38.6, _BLOG),),
        unknown=blog.unknown,
        evaluate=_FEW,
    )


def imagenette_tuned() -> Recipe:
    """Our own settings, meant to exceed the blog's accuracy on Imagenette in fewer GPU hours."""
    # Small views make a step three times as fast. With a queue of half the images, momentum 0.99 is enough, and the
    # key encoder keeps up.
    return Recipe(
        config=RunConfig(
            data=DataConfig(data=("imagenette",)),
            model=ModelConfig(
                arch="resnet18", stem="imagenet", mlp=True, moco_k=4096, moco_m=0.99, moco_t=0.2, bn_splits=8
            ),
            optim=OptimConfig(batch_size=256, lr=0.06, wd=5e-4, epochs=400, cos=True, warmup_epochs=5),
            augment=AugmentConfig(aug="v2", crop_size=128),
        ),
        data=_IMAGENETTE,
        expected=(Expected(f"{_FEW_LABELS}, to beat", 64.2, _BLOG),),
        evaluate=_FEW,
    )


def _variant(percent: float, **changes: object) -> Recipe:
    return Recipe(
        config=imagenet_v1().config.replace(**changes),
        data=_IMAGENET,
        expected=(Expected(f"{_PROTOCOL}, 200 epochs", percent, _V1),),
        evaluate=_LINEAR,
    )
