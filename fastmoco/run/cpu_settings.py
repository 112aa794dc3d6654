"""Settings that suit a CPU, in place of those of the closest recipe, which are for a GPU."""

from __future__ import annotations

from fastmoco.config import RunConfig

PHOTO_SIDE = 112  # pixels of a view: a quarter of the work of 224
IMAGES = 200_000  # over all epochs: one to two hours of two cores, where the recipes of a GPU take days or weeks
_REASON = "the device is a CPU"


def for_cpu(base: RunConfig, small: bool, images: int, own_batch: bool) -> tuple[RunConfig, dict[str, str]]:
    """The recipe as a CPU can train it on a number of images, and the reason for each field that differs.

    small      whether it is the recipe of small images, whose encoder is a ResNet-18 already
    own_batch  whether the batch size is given: the learning rate then follows from the recipe's

    The learning rate is that of ResNet-18 on 2,000 images of Imagenette with batches of 64: after 12 epochs at 64
    pixels kNN was 28.7 % with the linearly scaled 0.0075, and 29.9 % with 0.03.
    """
    usual = base.optim.epochs or 1
    epochs = max(1, min(usual, IMAGES // images))
    changes: dict[str, object] = {"epochs": epochs, "cos": True, "schedule": None}
    if not own_batch:
        changes |= {"batch_size": 64, "lr": 0.03}
    if not small:
        changes |= {"arch": "resnet18", "moco_k": 4096, "moco_m": 0.99}
    reasons: dict[str, str] = dict.fromkeys(("arch", "batch_size", "moco_k") if not small else ("batch_size",), _REASON)
    if epochs < usual:
        reasons["epochs"] = f"{_REASON}; {usual} on a GPU"
    return base.replace(**changes), reasons
