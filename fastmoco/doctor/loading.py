"""Every pipeline on a few files: its crops against those of `pipelines.data.decode`, and a rough rate.

V views · B images · S side of a crop
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmoco.doctor.findings import Finding, Status, Target
from fastmoco.doctor.images import BATCH, CROPPED, SIDE, WHOLE, expected_crops, planner, sample_images
from pipelines.backends.baseline import DataLoaderPipeline
from pipelines.backends.select import open_source
from pipelines.data.beton import read_index
from pipelines.data.beton_manifest import BetonManifest
from pipelines.data.beton_writer import BetonWriter
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError, how_to_install
from pipelines.views import BatchPlan, Crops

# Limits for all pipelines (docs/pipelines.md): decoders and resize filters differ a little.
_MEAN_LEVELS, _LARGE_LEVELS, _LARGE_SHARE = 2.0, 12.0, 1e-3
_MEASURED_S = 1.0
_MAX_BATCHES = 200
_WORKERS = 2  # rates here are rough: more would take longer to start than to measure

DALI_BRINGS = f"decodes JPEGs on the GPU (on a CPU, 2 to 6 times a DataLoader): {how_to_install('dali')}"
FFCV_BRINGS = (
    "one decode and all crops in compiled code, half the CPU time of --pipeline torch: apt-get install pkg-config "
    f"libopencv-dev libturbojpeg0-dev, then {how_to_install('ffcv')}"
)


def resident(target: Target) -> Finding:
    """Images decoded once into device memory."""
    return try_source("resident", sample_images(target.scratch), target.device)


def workers(target: Target) -> Finding:
    """`--pipeline torch`: worker processes."""
    return try_source("torch", sample_images(target.scratch), target.device)


def dali(target: Target) -> Finding:
    """NVIDIA DALI: on the GPU if the device is one."""
    try:
        return try_source("dali", sample_images(target.scratch), target.device)
    except BackendMissingError as error:
        return Finding(status=Status.MISSING, text=str(error), advice=DALI_BRINGS)


def ffcv(target: Target) -> Finding:
    """FFCV's decoder on a `.beton` file of the same images."""
    path = os.path.join(target.scratch, "images.beton")
    if not os.path.exists(path):
        write_beton(sample_images(target.scratch), path)
    try:
        return try_source("ffcv", read_index(path), target.device)
    except BackendMissingError as error:
        return Finding(status=Status.MISSING, text=str(error), advice=FFCV_BRINGS)


def dataloader(target: Target) -> Finding:
    """The baseline, in this process: its workers are started like those of `torch`.

    It draws its own random numbers, so its crops are whole images here.
    """
    index = sample_images(target.scratch)
    plans = planner(index, WHOLE)
    device = torch.device(target.device)
    pipeline = DataLoaderPipeline(index, plans, SIDE, device, torch.float32, 0)
    batches = pipeline.views(0, _MAX_BATCHES)
    first = next(batches)
    plan = plans.plan(0)
    query = (255 * first.query).permute(0, 2, 3, 1)
    rate = _images_per_s(batches)
    return judge("dataloader", query[None], BatchPlan(0, 0, plan.indices, plan.boxes[:1], *_rest(plan)), index, rate)


def _rest(plan: BatchPlan) -> tuple[np.ndarray, np.ndarray]:
    return plan.params[:1], plan.key_order


def try_source(name: str, index: ImageIndex, device: str) -> Finding:
    """The crops of the first batch of a backend, and the images per second of the following ones."""
    source = open_source(name, index, SIDE, torch.device(device), _WORKERS)
    batches = source.crops(planner(index, CROPPED).plans(0, _MAX_BATCHES))
    first: Crops = next(batches)
    images = first.images.clone()
    rate = _images_per_s(batches)
    source.close()
    return judge(name, images, first.plan, index, rate)


def _images_per_s(batches: Iterator[object]) -> float:
    """Rate of the batches after the first."""
    began, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - began > _MEASURED_S:
            break
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return count * BATCH / (time.perf_counter() - began)


def judge(name: str, crops: Tensor, plan: BatchPlan, index: ImageIndex, images_per_s: float) -> Finding:
    """Compare the crops of a plan, (V, B, S, S, 3) levels, with the plainest ones."""
    difference = (crops.cpu().float() - expected_crops(index, plan)).abs()
    mean, largest = difference.mean().item(), difference.max().item()
    share = (difference > _LARGE_LEVELS).double().mean().item()
    figures = {
        "images_per_s": images_per_s,
        "side": SIDE,
        "mean_difference_levels": mean,
        "max_difference_levels": largest,
        "large_difference_share": share,
    }
    pixels = f"pixels differ by {mean:.2f}/255 in the mean, {largest:.0f}/255 at most"
    if mean <= _MEAN_LEVELS and share <= _LARGE_SHARE:
        return Finding(text=f"{images_per_s:,.0f} images/s; {pixels}", figures=figures)
    return Finding(
        status=Status.FAILED,
        text=f"{pixels}, {share:.1%} of them by more than {_LARGE_LEVELS:.0f}; allowed are {_MEAN_LEVELS:g} and "
        f"{_LARGE_SHARE:.1%}",
        figures=figures,
        advice=f"its images are wrong: use another --pipeline than {name}, and report this with fastmoco doctor --json",
    )


def write_beton(index: ImageIndex, path: str) -> None:
    """The images as a `.beton` file: JPEGs as they are, others as pixels."""
    assert index.paths is not None
    largest = 3 * int(index.sizes.astype(np.int64).prod(axis=1).max())
    with BetonWriter(path, len(index), largest) as writer:
        for i, name in enumerate(index.paths):
            data = Path(name).read_bytes() if name.endswith(".jpg") else index.read(i)
            height, width = index.sizes[i].tolist()
            writer.add(data, (height, width), None, os.path.basename(name))
        writer.finish(
            lambda length, tables_sha256, image_digests: BetonManifest(
                dataset=index.name,
                bytes=length,
                images=len(writer),
                tables_sha256=tables_sha256,
                image_digests=image_digests,
                class_names=[],
                names=writer.names,
                stored={},
                settings={},
                quarantine=[],
                versions={},
            )
        )
