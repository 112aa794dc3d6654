"""Fills in the fields that a configuration leaves open, from the images, the device and the closest recipe."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from fastmoco.config import ResolvedConfig, RunConfig
from fastmoco.config.resume import absolute_data, rescaled
from fastmoco.device import pick_amp
from fastmoco.distributed.launch import SINGLE_PROCESS, RankInfo
from fastmoco.errors import BackendMissingError, ConfigError
from fastmoco.recipes import recipe
from fastmoco.registry import ARCHITECTURES
from fastmoco.run.cpu_settings import PHOTO_SIDE, for_cpu
from fastmoco.run.foreign_backbone import for_any_model, taken_as_it_is
from fastmoco.run.normalization import sampled_normalization, scanned_normalization
from fastmoco.run.thread_count import default_threads
from fastmoco.step.kernels import check_kernels, compiler_missing, triton_missing
from pipelines.backends.select import choose, default_workers
from pipelines.data.index import ImageIndex
from pipelines.files import absolute

GROUP = 16  # smallest batch norm group; with 32 images in 8 groups, shapes reaches 63 % instead of 83 %
COMPILE_WORTH_STEPS = 100_000  # ten minutes to two hours of training, of which compiling takes about one minute
SMALL = 64  # largest crop side in pixels for the CIFAR stem, augmentation and hyper-parameters


def resolve(
    config: RunConfig,
    images: ImageIndex,
    device: torch.device,
    rank_info: RankInfo = SINGLE_PROCESS,
    from_recipe: Collection[str] = (),
) -> tuple[ResolvedConfig, dict[str, str]]:
    """The configuration to train with, and the reason for each choice that was made here.

    from_recipe  fields of a recipe that were not given beside it: a queue or a batch larger than the images, and what
                 follows from the batch, is chosen as if the recipe did not say it

    Raises ConfigError where the settings, the images and the number of devices do not go together.
    """
    config, reasons = _within_images(config, len(images), rank_info.size, from_recipe)
    given = config.flat()
    side = given["crop_size"] or _crop_size(images)
    if given["crop_size"] is None:
        reasons["crop_size"] = (
            f"the images are {images.describe().split(' images ')[1].split(' (')[0].removeprefix('of ')}"
        )
    small = side <= SMALL
    photographs = small and given["crop_size"] is not None and _shorter_side(images) > SMALL
    base_name, base = _nearest_recipe(given["data"], small)
    device_reasons: dict[str, str] = {}
    if device.type == "cpu" and base_name != "shapes":
        base, device_reasons = for_cpu(base, small, len(images), own_batch=given["batch_size"] is not None)
        if given["crop_size"] is None and side > PHOTO_SIDE:
            side = PHOTO_SIDE
            reasons["crop_size"] += ", and the device is a CPU"
    values = base.flat()
    filled = {name: values[name] for name in given if given[name] is None and values[name] is not None}
    if given["aug_plus"]:
        filled |= {"aug": "v2"}
    if given["cos"] or given["schedule"] is not None:
        filled.pop("schedule", None)
    elif given["epochs"] not in (None, values["epochs"]) and values["schedule"] is not None:
        filled["schedule"] = rescaled(values["schedule"], values["epochs"], given["epochs"])
    if given["schedule"] is None and "schedule" not in filled:
        filled["cos"] = True
    if photographs and given["aug"] is None and not given["aug_plus"]:
        reasons["crop_size"] = f"crops up to {SMALL} pixels: as in the recipe {base_name}"
        if given["normalization"] == "aug" and given["mean"] is None and given["channels"] == 3:
            filled["normalization"] = "imagenet"
            reasons["crop_size"] += ", but with ImageNet's mean and std, since the images are larger"
    reasons |= {name: f"as in the recipe {base_name}" for name in ("arch", "moco_k", "batch_size") if name in filled}
    reasons |= {name: why for name, why in device_reasons.items() if name in filled}
    if given["width"] == 1.0 and given["arch"] is None:
        filled["width"] = values["width"]

    batch = _batch_size(given["batch_size"], values["batch_size"], len(images), rank_info.size)
    if given["resume_from"] is not None:
        filled["resume_from"] = absolute(given["resume_from"])
    filled |= {"data": absolute_data(given["data"]), "crop_size": side, "batch_size": batch}
    if given["lr"] is None and batch != values["batch_size"] and given["lr_scaling"] == "linear":
        filled["lr"] = values["lr"] * batch / values["batch_size"]
        reasons["lr"] = f"{values['lr']:g} for a batch of {values['batch_size']}, scaled to {batch}"
    if given["mechanism"] != "queue":
        filled["moco_m"] = 0.0
    filled["moco_k"], why = _dictionary_size(config, values["moco_k"], len(images), batch)
    reasons |= {"moco_k": why} if why else {}
    arch = given["arch"] or values["arch"]
    ours = arch in ARCHITECTURES
    if given["stem"] == "auto":
        filled["stem"] = "cifar" if small and ours else "imagenet"
    if given["stem"] == "auto" and ours:
        reasons["stem"] = f"crops of {side} pixels"
    if not ours:
        settings, why = taken_as_it_is(arch, config, side, small)
        filled |= settings
        reasons |= why
    filled["bn_splits"] = _bn_splits(given["bn_splits"], batch, rank_info.size)
    if given["normalization"] == "scan" and given["mean"] is None:
        filled["mean"], filled["std"] = scanned_normalization(given["data"], given["data_root"], config.data.decoding)
    elif given["channels"] != 3 and given["mean"] is None:
        filled["mean"], filled["std"], count = sampled_normalization(images)
        reasons["mean"] = f"of {count:,} of the images: there is no usual one of {given['channels']} channels"
    filled["amp"] = pick_amp(given["amp"], device)
    steps = len(images) // batch * (given["epochs"] or values["epochs"])
    speed, why = _speed(config if ours else for_any_model(config), device, steps, rank_info.size)
    filled |= speed
    reasons |= why
    if given["cpu_threads"] is None and given["deterministic"] and device.type == "cpu":
        filled["cpu_threads"] = default_threads()  # sums depend on it, by rounding
    filled["pipeline"], reasons["pipeline"] = choose(given["pipeline"], images, device)
    if given["workers"] is None:
        filled["workers"] = max(1, default_workers() // rank_info.local_size)
    if given["knn_every"] is None:
        filled["knn_every"] = values["knn_every"] or max(1, (given["epochs"] or values["epochs"]) // 20)
    return ResolvedConfig.of(config.replace(**filled)), reasons


def _within_images(
    config: RunConfig, images: int, devices: int, from_recipe: Collection[str]
) -> tuple[RunConfig, dict[str, str]]:
    """The configuration with the queue and the batch of a recipe reduced to the images, and the reasons."""
    reasons: dict[str, str] = {}
    batch, keys = config.optim.batch_size, config.model.moco_k
    if isinstance(batch, int) and batch > images and "batch_size" in from_recipe:
        fitting = _batch_size(None, batch, images, devices)
        fields: dict[str, Any] = {"batch_size": fitting}
        if config.optim.lr is not None and "lr" in from_recipe and config.optim.lr_scaling == "linear":
            fields["lr"] = config.optim.lr * fitting / batch
            reasons["lr"] = f"{config.optim.lr:g} for a batch of {batch}, scaled to {fitting}"
        if config.model.bn_splits is not None and "bn_splits" in from_recipe:
            fields["bn_splits"] = None
        config = config.replace(**fields)
        reasons["batch_size"] = f"the recipe's {batch} are more than the {images:,} images"
    if keys is not None and keys > images and "moco_k" in from_recipe and not config.run.allow_large_queue:
        config = config.replace(moco_k=images)
        reasons["moco_k"] = f"the recipe's {keys:,} are more than the {images:,} images"
    return config, reasons


def portable(config: RunConfig, device: torch.device) -> RunConfig:
    """The configuration of a run that goes on on a CPU, without the choices that were made for its GPU.

    They change the weights by rounding at most, so the ones for this device are made again.
    """
    run = config.run
    goes_on = run.resume or run.resume_from is not None
    if device.type == "cuda" or not goes_on:
        return config
    try:
        check_kernels("torch" if run.kernels == "auto" else run.kernels, device)
        if "on" not in (run.cuda_graph, run.prefetch):
            return config
    except BackendMissingError:
        pass
    return config.replace(kernels="auto", compile="auto", cuda_graph="auto", prefetch="auto", stem_format="auto")


def _nearest_recipe(data: tuple[str, ...], small: bool) -> tuple[str, RunConfig]:
    name = "shapes" if data == ("shapes",) else "cifar10-demo" if small else "imagenet-v1"
    return name, recipe(name)


def _shorter_side(images: ImageIndex) -> int:
    """The median of the images' shorter sides in pixels."""
    return int(np.median(images.sizes.min(axis=1)))


def _crop_size(images: ImageIndex) -> int:
    """224 pixels, or what smaller images have: the median of their shorter sides, in multiples of 8 from 32 on."""
    shorter = _shorter_side(images)
    return max(8, shorter if shorter < 32 else min(224, shorter - shorter % 8))


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


def _speed(config: RunConfig, device: torch.device, steps: int, ranks: int) -> tuple[dict[str, str], dict[str, str]]:
    """Kernels, compilation, CUDA graph, prefetching and format of the stem; and what is missing for faster ones.

    On a GPU the encoders are compiled if the run is long enough to repay it, and without the Triton kernels, which fuse
    most of what the compiler would, in every run. Not with them on several GPUs: the compiled backward hands over all
    gradients at its end, so that their sum would no longer overlap with it.
    """
    run, on_gpu = config.run, device.type == "cuda"
    missing = triton_missing() if on_gpu else None
    kernels = ("triton" if on_gpu and missing is None else "torch") if run.kernels == "auto" else run.kernels
    check_kernels(kernels, device)
    uncompiled = compiler_missing(device) if on_gpu else ""
    long_enough = steps >= COMPILE_WORTH_STEPS and ranks == 1
    compiled = on_gpu and (long_enough or kernels == "torch") and uncompiled is None and not run.checkpoint_activations
    if run.cuda_graph == "on" and not on_gpu:
        raise ConfigError(f"--cuda-graph on needs a GPU, and the device is {device}: use --cuda-graph off")
    if run.prefetch == "on" and not on_gpu:
        raise ConfigError(f"--prefetch on needs a GPU, and the device is {device}: use --prefetch off")
    reasons = {}
    if missing is not None:
        reasons["kernels"] = f"without fused kernels and torch.compile: {missing}"
    elif uncompiled and long_enough and run.compile == "auto":
        reasons["compile"] = f"without torch.compile: {uncompiled}"
    return {
        "kernels": kernels,
        "compile": ("default" if compiled else "off") if run.compile == "auto" else run.compile,
        "cuda_graph": ("on" if on_gpu else "off") if run.cuda_graph == "auto" else run.cuda_graph,
        "prefetch": ("on" if on_gpu else "off") if run.prefetch == "auto" else run.prefetch,
        "stem_format": "channels-last" if run.stem_format == "auto" else run.stem_format,
    }, reasons


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
