"""Augmentation presets: what `--aug` can be. To add one, add it to PRESETS.

Nothing here imports NumPy or torch: the command line reads the names.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A recipe for random views. Probabilities in [0, 1]; jitter strengths as in torchvision's ColorJitter."""

    name: str
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    vertical_flip_p: float = 0.0
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey_p: float = 0.2
    grey_first: bool = False
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_p: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


# He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020; as in their code, greyscale
# comes before the jitter.
V1 = Augmentation(name="v1", scale=(0.2, 1.0), jitter_p=1.0, hue=0.4, grey_first=True)
# Chen et al., "Improved baselines with momentum contrastive learning", 2020.
V2 = Augmentation(name="v2", scale=(0.2, 1.0), blur_p=0.5)
# The authors' CIFAR-10 demo.
CIFAR = Augmentation(name="cifar", scale=(0.08, 1.0), mean=CIFAR_MEAN, std=CIFAR_STD)
# Grill et al., "Bootstrap your own latent", 2020, table 6. There one view is always blurred and the other at times, and
# only that one solarised; here each view has the mean of their probabilities, so that either may be the query.
BYOL = Augmentation(name="byol", scale=(0.08, 1.0), saturation=0.2, blur_p=0.55, solarise_p=0.1)
PRESETS = (
    V1,
    V2,
    CIFAR,
    BYOL,
)
AUGMENTATIONS = {preset.name: preset for preset in PRESETS}
