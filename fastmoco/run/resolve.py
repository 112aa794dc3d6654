"""Fills in the fields that a configuration leaves open, from the images, the device and the closest recipe."""

from __future__ import annotations

import numpy as np
import torch

from fastmoco.config import ResolvedConfig, RunConfig
from fastmoco.device import pick_amp
from fastmoco.distributed.launch import SINGLE_PROCESS, RankInfo
from fastmoco.errors import ConfigError
from fastmoco.recipes import recipe
from fastmoco.step.kernels import check_kernels, triton_missing
from pipelines.backends.select import choose, default_workers
from pipelines.data.index import ImageIndex

GROUP = 16  # smallest batch norm group; with 32 images in 8 groups, shapes reaches 63 % instead of 83 %
SMALL = 64  # largest crop side in pixels for the CIFAR stem, augmentation and hyper-parameters


def resolve(
    config: RunConfig, images: ImageIndex, device: torch.device, rank_info: RankInfo = SINGLE_PROCESS
) -> tuple[ResolvedConfig, dict[str, str]]:
    """The configuration to train with, and the reason for each choice that was made here.

    Raises ConfigError where the settings, the images and the number of devices do not go together.
    """
    reasons: dict[str, str] = {}
    given = config.flat()
    side = given["crop_size"] or _crop_size(images)
    if given["crop_size"] is None:
        reasons["crop_size"] = (
            f"the images are {images.describe().split(' images ')[1].split(' (')[0].removeprefix('of ')}"
        )
    small = side <= SMALL
    base_name, base = _nearest_recipe(given["data"], small)
    values = base.flat()
    filled = {name: values[name] for name in given if given[name] is None and values[name] is not None}
    if given["aug_plus"]:
        filled |= {"aug": "v2"}
    if given["cos"] or given["schedule"] is not None:
        filled.pop("schedule", None)
    elif given["epochs"] not in (None, values["epochs"]) and values["schedule"] is not None:
        filled["schedule"] = _rescaled(values["schedule"], values["epochs"], given["epochs"])
    if given["schedule"] is None and "schedule" not in filled:
        filled["cos"] = True
    reasons |= {name: f"as in the recipe {base_name}" for name in ("arch", "moco_k", "batch_size") if name in filled}
    if given["width"] == 1.0 and given["arch"] is None:
        filled["width"] = values["width"]

    batch = _batch_size(given["batch_size"], values["batch_size"], len(images), rank_info.size)
    filled |= {"crop_size": side, "batch_size": batch}
    if given["lr"] is None and batch != values["batch_size"] and given["lr_scaling"] == "linear":
        filled["lr"] = values["lr"] * batch / values["batch_size"]
        reasons["lr"] = f"{values['lr']:g} for a batch of {values['batch_size']}, scaled to {batch}"
    if given["mechanism"] != "queue":
        filled["moco_m"] = 0.0
    filled["moco_k"], why = _dictionary_size(config, values["moco_k"], len(images), batch)
    reasons |= {"moco_k": why} if why else {}
    if given["stem"] == "auto":
        filled["stem"] = "cifar" if small else "imagenet"
        reasons["stem"] = f"crops of {side} pixels"
    filled["bn_splits"] = _bn_splits(given["bn_splits"], batch, rank_info.size)
    filled["amp"] = pick_amp(given["amp"], device)
    speed, why = _speed(config, device)
    filled |= speed
    reasons |= {"kernels": why} if why else {}
    if given["cpu_threads"] is None and given["deterministic"] and device.type == "cpu":
        filled["cpu_threads"] = torch.get_num_threads()  # sums depend on it, by rounding
    filled["pipeline"], reasons["pipeline"] = choose(given["pipeline"], images, device)
    if given["workers"] is None:
        filled["workers"] = max(1, default_workers() // rank_info.local_size)
    if given["knn_every"] is None:
        filled["knn_every"] = values["knn_every"] or max(1, (given["epochs"] or values["epochs"]) // 20)
    return ResolvedConfig.of(config.replace(**filled)), reasons


def _nearest_recipe(data: str, small: bool) -> tuple[str, RunConfig]:
    name = "shapes" if data == "shapes" else "cifar10-demo" if small else "imagenet-v1"
    return name, recipe(name)


def _crop_size(images: ImageIndex) -> int:
    """224 pixels, or what smaller images have: the median of their shorter sides, in multiples of 8 from 32 on."""
    shorter = int(np.median(images.sizes.min(axis=1)))
    return max(8, shorter if shorter < 32 else min(224, shorter - shorter % 8))


def _rescaled(schedule: tuple[int, ...], epochs: int, wanted: int) -> tuple[int, ...]:
    """The same fractions of another number of epochs."""
    return tuple(sorted({max(1, round(epoch * wanted / epochs)) for epoch in schedule}))


def _batch_size(given: int | None, usual: int, images: int, devices: int) -> int:
    if given is not None:
        if given > images:
            raise ConfigError(f"--batch-size {given} is larger than the {images:,} images: use {images} or less")
        if given % devices:
            fitting = max(devices, given - given % devices)
            raise ConfigError(
                f"--batch-size {given} is that of all {devices} devices and cannot be divided equally: use "
                f"--batch-size {fitting}"
            )
        return given
    if images < max(2, devices):
        found = f"{images} image{'s' * (images != 1)}"
        raise ConfigError(f"found {found}: a batch needs {max(2, devices)} or more")
    batch = min(usual, images - images % 8 if images >= 16 else images)
    return max(devices, batch - batch % devices)


def _bn_splits(given: int | None, batch: int, devices: int) -> int:
    """Number of groups: each device gets whole groups, or several devices share one.

    On more than 8 devices each gets its own group, as in the paper, if that has enough images.
    """

    def divides(splits: int) -> bool:
        return splits % devices == 0 or devices % splits == 0

    if given is not None:
        if not divides(given):
            raise ConfigError(
                f"--bn-splits {given} cannot be divided over {devices} devices: use --bn-splits {devices} for one "
                "group on each, a multiple of that, or 1 for one group over all"
            )
        return given
    usual = [1, 2, 4, 8]
    candidates = usual if devices in usual else [*usual, *range(devices, max(8, devices) + 1, devices)]
    return max(n for n in candidates if n == 1 or (divides(n) and batch % n == 0 and batch // n >= GROUP))


def _speed(config: RunConfig, device: torch.device) -> tuple[dict[str, str], str]:
    """Kernels, compilation, CUDA graph, prefetching and format of the stem, and what is missing for faster ones.

    Compilation is off with the Triton kernels: they fuse batch norm, ReLU and residual sum, which is what it would fuse
    in an encoder, and the CUDA graph saves the launches.
    """
    run, on_gpu = config.run, device.type == "cuda"
    missing = triton_missing() if on_gpu else None
    kernels = ("triton" if on_gpu and missing is None else "torch") if run.kernels == "auto" else run.kernels
    check_kernels(kernels, device)
    compiled = on_gpu and kernels == "torch" and missing is None and not run.checkpoint_activations
    if run.cuda_graph == "on" and not on_gpu:
        raise ConfigError(f"--cuda-graph on needs a GPU, and the device is {device}: use --cuda-graph off")
    if run.prefetch == "on" and not on_gpu:
        raise ConfigError(f"--prefetch on needs a GPU, and the device is {device}: use --prefetch off")
    return {
        "kernels": kernels,
        "compile": ("default" if compiled else "off") if run.compile == "auto" else run.compile,
        "cuda_graph": ("on" if on_gpu else "off") if run.cuda_graph == "auto" else run.cuda_graph,
        "prefetch": ("on" if on_gpu else "off") if run.prefetch == "auto" else run.prefetch,
        "stem_format": "channels-last" if run.stem_format == "auto" else run.stem_format,
    }, "" if missing is None else f"without fused kernels and torch.compile: {missing}"


def _dictionary_size(config: RunConfig, usual: int, images: int, batch: int) -> tuple[int, str]:
    """K, and the reason where the mechanism determines it.

    A queue holds every image at most once, so that no key is a negative of its own image's query.
    """
    given, mechanism = config.model.moco_k, config.model.mechanism
    if mechanism == "end-to-end":
        return _batch_as_dictionary(given, batch), "the dictionary is the batch"
    if mechanism == "memory-bank" and images == batch:
        raise ConfigError(
            f"--batch-size {batch} is all the images, and --mechanism memory-bank draws its negatives from those "
            f"outside the batch: use --batch-size {max(2, batch // 2)} or less"
        )
    if given is None:
        return min(usual, images), ""
    if given > images and not config.run.allow_large_queue:
        raise ConfigError(
            f"--moco-k {given} is larger than the {images:,} images, so that an image would be its own negative: "
            f"use --moco-k {images} or less, or --allow-large-queue"
        )
    return given, ""


def _batch_as_dictionary(given: int | None, batch: int) -> int:
    """K of end-to-end training, which is the batch: only the keys of this step receive a gradient."""
    if given in (None, batch):
        return batch
    if given > batch:
        raise ConfigError(
            f"--moco-k {given} is larger than the batch of {batch}: with --mechanism end-to-end the dictionary is the "
            "batch, because every key needs its gradient, so a large one takes the memory of a large batch: use "
            f"--moco-k {batch}, --batch-size {given}, or --mechanism queue"
        )
    raise ConfigError(
        f"--moco-k {given} is smaller than the batch of {batch}: with --mechanism end-to-end the dictionary is the "
        f"batch: use --moco-k {batch} or --batch-size {given}"
    )
