"""Batches that are prepared while the device works on others: the views, crops and steps are those of the CPU.

Every test runs on the CPU too, where nothing is asynchronous: that is a test of the test.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastmoco.step.cuda_graph import GraphedStep
from pipelines.augment.presets import CIFAR, V2, Augmentation
from pipelines.backends.resident import ResidentCrops
from pipelines.backends.select import open_source
from pipelines.backends.two_view import TwoViewPipeline
from pipelines.data.beton import read_index
from pipelines.data.headers import read_headers
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from pipelines.views import CropSource, Views
from tests.oddities import encode, picture
from tests.step.test_step_parity import BATCH, EMA, LR, SIDE, make_step
from tools.make_ffcv import Settings, convert

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
STEPS = 7  # several times the buffers of a pipeline, and more than one epoch
BUSY_CYCLES = 20_000_000  # about 10 ms of a GPU: the host, and without an order the loading too, run ahead


class Bound(NamedTuple):
    """Limits on the difference from the CPU's crops, in levels of 255: of the mean, and of 99.9 % of the pixels."""

    mean: float
    most: int


# The same code makes the crops of `torch` and `ffcv` on every device. The kernel of `resident` sums in another order,
# which moves a value that is half-way between two levels. A GPU's JPEG decoder rounds differently.
BOUNDS = {"resident": Bound(0.01, 1), "torch": Bound(0, 0), "ffcv": Bound(0, 0), "dali": Bound(2, 12)}


@pytest.fixture(params=BOUNDS)
def name(request: pytest.FixtureRequest, require_backend: Callable[[str], None]) -> str:
    if request.param in ("dali", "ffcv"):
        require_backend(request.param)
    return request.param


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of different sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(3 * BATCH):
        pixels = np.roll(picture(30 + i, 70 - i), 3 * i, axis=1) ^ np.uint8(8 * (i % 4))
        (folder / f"{i:02}.jpg").write_bytes(encode(pixels, "JPEG", quality=90))
    return folder


@pytest.fixture(scope="module")
def files(photographs: Path) -> ImageIndex:
    paths = [str(path) for path in sorted(photographs.iterdir())]
    sizes, bad = read_headers(paths)
    assert not bad
    return ImageIndex("photographs", sizes, paths=tuple(paths))


@pytest.fixture
def index(name: str, files: ImageIndex, tmp_path: Path) -> ImageIndex:
    """The images as the backend reads them."""
    if name != "ffcv":
        return files
    convert(files, Settings(data=(files.name,), out=str(tmp_path / "images.beton"), workers=2), Console(quiet=True))
    return read_index(str(tmp_path / "images.beton"))


def open_crops(name: str, index: ImageIndex, device: torch.device) -> CropSource:
    if name == "dali":
        from pipelines.backends.dali import DaliCrops

        return DaliCrops(index, SIDE, device, 2, resize_by_dali=True)  # on the CPU as well
    return open_source(name, index, SIDE, device, 0 if (name, device) == ("torch", CPU) else 2)


def planner_of(index: ImageIndex, augmentation: Augmentation = V2) -> Planner:
    return Planner(index.sizes, seed=5, batch_size=BATCH, augmentation=augmentation, shuffle_keys=True)


def expected_views(name: str, index: ImageIndex, augmentation: Augmentation) -> list[Views]:
    source = open_crops(name, index, CPU)
    try:
        return list(TwoViewPipeline(planner_of(index, augmentation), source, CPU, torch.float32).views(0, STEPS))
    finally:
        source.close()


def keep_busy(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda._sleep(BUSY_CYCLES)


def copies(batches: Iterator[Views], device: torch.device) -> list[Views]:
    """Copies that a busy device makes, long after the host has asked for the next batches."""
    kept = []
    for views in batches:
        keep_busy(device)
        kept.append(Views(*(t.clone() for t in (views.query, views.key, views.key_order, views.index))))
    return kept


def assert_images_agree(actual: Tensor, expected: Tensor, bound: Bound, scale: float = 1.0) -> None:
    """`scale` levels for each level of the bound, and rounding errors."""
    error = (actual.float().cpu() - expected.float()).abs()
    assert error.mean() <= scale * bound.mean + 1e-4
    assert (error > scale * bound.most + 1e-4).float().mean() <= (1e-3 if bound.most else 0)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_crops(name: str, index: ImageIndex, device: torch.device) -> None:
    source, on_cpu = open_crops(name, index, device), open_crops(name, index, CPU)
    crops = []
    for batch in source.crops(planner_of(index).plans(0, STEPS)):
        keep_busy(device)
        crops.append(batch.images.clone())
    expected = list(on_cpu.crops(planner_of(index).plans(0, STEPS)))
    assert len(crops) == len(expected) == STEPS
    for actual, wanted in zip(crops, expected, strict=True):
        assert_images_agree(actual, wanted.images, BOUNDS[name])
    source.close()
    on_cpu.close()


@pytest.mark.parametrize("augmentation", [V2, CIFAR], ids=lambda a: a.name)
@pytest.mark.parametrize("options", [{}, {"triton": False}, {"prefetch": False}], ids=["default", "torch", "in turn"])
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_views(
    name: str, index: ImageIndex, device: torch.device, options: dict[str, bool], augmentation: Augmentation
) -> None:
    """Two iterators of one pipeline in turn, and a third after one of them was abandoned."""
    source = open_crops(name, index, device)
    pipeline = TwoViewPipeline(planner_of(index, augmentation), source, device, torch.float32, **options)
    first, second = pipeline.views(0, STEPS), pipeline.views(0, STEPS)
    head = copies((next(iterator) for _ in range(3) for iterator in (first, second)), device)
    second.close()  # type: ignore[attr-defined]
    tail, again = copies(first, device), copies(pipeline.views(0, STEPS), device)
    pipeline.close()

    expected = expected_views(name, index, augmentation)
    level = 4 / 255 / 0.2  # of a normalised view: jitter may increase a difference fourfold
    for batches in ([*head[::2], *tail], head[1::2], again):
        for actual, wanted in zip(batches, expected, strict=len(batches) == STEPS):
            assert torch.equal(actual.key_order.cpu(), wanted.key_order)
            assert torch.equal(actual.index.cpu(), wanted.index)
            assert_images_agree(actual.query, wanted.query, BOUNDS[name], level)
            assert_images_agree(actual.key, wanted.key, BOUNDS[name], level)
    assert len(tail) == STEPS - 3


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_steps(name: str, index: ImageIndex, device: torch.device) -> None:
    """On a GPU, a captured step on prefetched views; the differences are those of its convolutions and decoder."""
    source = open_crops(name, index, device)
    pipeline = TwoViewPipeline(planner_of(index, CIFAR), source, device, torch.float32)
    trained, reference = make_step(bn_splits=2, device=str(device)), make_step(bn_splits=2)
    step = None if device.type == "cuda" else trained
    for views in pipeline.views(0, STEPS):
        step = step or GraphedStep(trained, views)
        keep_busy(device)
        step(views, LR, EMA)
    for views in expected_views(name, index, CIFAR):
        reference(views, LR, EMA)
    pipeline.close()
    close = 0.05 if device.type == "cuda" else 0.0
    metrics, wanted = trained.read_metrics(), reference.read_metrics()
    assert metrics["steps"] == wanted["steps"] == STEPS
    assert metrics["loss"] == pytest.approx(wanted["loss"], rel=close)
    torch.testing.assert_close(trained.dictionary.keys.cpu(), reference.dictionary.keys, rtol=0, atol=close)


@pytest.mark.gpu
def test_memory_does_not_grow_with_the_lead_of_the_host(files: ImageIndex) -> None:
    """Nor with the number of iterators: they prepare batches in one stream, for which torch keeps freed memory."""
    device = torch.device("cuda")
    pipeline = TwoViewPipeline(planner_of(files), ResidentCrops(files, 96, device, 2), device, torch.float32)
    for views in pipeline.views(0, 3):
        keep_busy(device)
        views.query.add_(1)
    reserved = torch.cuda.memory_reserved(device)
    for _ in range(3):
        for views in pipeline.views(0, 20):
            keep_busy(device)
            views.query.add_(1)
    assert torch.cuda.memory_reserved(device) == reserved


@pytest.mark.gpu
def test_an_abandoned_iterator_ends_its_thread(files: ImageIndex) -> None:
    device = torch.device("cuda")
    pipeline = TwoViewPipeline(planner_of(files), ResidentCrops(files, SIDE, device, 2), device, torch.float32)
    views = pipeline.views(0, 10**6)
    next(views)
    del views
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("plans"):
            thread.join(10)
            assert not thread.is_alive()
