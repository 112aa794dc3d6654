"""The paper's ablations on CIFAR-10, with its results on ImageNet: `fastmoco sweep ablation-momentum`."""

from __future__ import annotations

from fastmoco.recipes.entry import Published, Recipe
from fastmoco.recipes.small_images import cifar10_demo

_LINEAR = "linear on ImageNet"

PUBLISHED: dict[str, Published] = {
    "moco_m": Published(
        {"0.0": None, "0.9": 55.2, "0.99": 57.8, "0.999": 59.0, "0.9999": 58.9},
        f"{_LINEAR}, K 4,096",
        "He et al. 2020, section 4.1",
    ),
    "mechanism": Published(
        {"queue": 60.6, "end-to-end": 57.3, "memory-bank": 58.0},
        f"{_LINEAR}, K 65,536; end-to-end 1,024",
        "He et al. 2020, figure 3",
    ),
    "moco_k": Published(
        {"256": 54.7, "512": 56.4, "1024": 57.5, "4096": 59.0, "16384": 60.4, "65536": 60.6},
        _LINEAR,
        "He et al. 2020, figure 3",
    ),
}
"""Published results by field of the configuration."""


def ablation_momentum() -> Recipe:
    """Momentum of the key encoder."""
    return _ablation("moco-m=0,0.9,0.99,0.999,0.9999", "moco_m")


def ablation_mechanism() -> Recipe:
    """Queue, end-to-end and memory bank, each with its own dictionary size."""
    return _ablation("mechanism=queue,end-to-end,memory-bank", "mechanism", moco_m=None, moco_k=None)


def ablation_queue() -> Recipe:
    """Number of keys in the queue."""
    return _ablation("moco-k=256,512,1024,4096,16384", "moco_k")


def _ablation(vary: str, field: str, **changes: object) -> Recipe:
    base, paper = cifar10_demo(), PUBLISHED[field]
    results = ", ".join(
        f"{value} {'fails' if percent is None else percent}" for value, percent in paper.percent.items()
    )
    return Recipe(
        config=base.config.replace(**changes),
        data=base.data,
        unknown=f"{paper.source} ({paper.what}, %): {results}. On CIFAR-10 only the ranking is comparable.",
        vary=vary,
    )
