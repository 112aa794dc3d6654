"""The contract of every crop source: the plan's images, boxes and parameters, and pixels that match float64."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from pipelines.augment.presets import CIFAR, V1, V2, Augmentation
from pipelines.backends.baseline import DataLoaderPipeline
from pipelines.backends.resident import ResidentCrops
from pipelines.backends.torch import CHUNK, TorchCrops
from pipelines.backends.two_view import TwoViewPipeline
from pipelines.data.beton import read_index
from pipelines.data.decoding import Decoding
from pipelines.data.headers import inspect_headers, read_headers
from pipelines.data.index import ImageIndex
from pipelines.errors import DataError
from pipelines.plan.planner import Planner, eval_plans
from pipelines.views import BatchPlan, CropSource, Views
from tests.oddities import bad_files, encode, good_files, picture, png, write_files
from tests.reference_crops import errors
from tests.tiff_writer import tiff
from tools.make_ffcv import Settings, convert

# What --hflip 0 --vflip 0.7 --color-jitter 0 --grayscale 0 --mean --std make of v2.
PLAIN_TURNED = replace(
    V2,
    name="turned",
    flip_p=0.0,
    vertical_flip_p=0.7,
    jitter_p=0.0,
    grey_p=0.0,
    mean=(0.2, 0.5, 0.6),
    std=(0.1, 0.2, 0.3),
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Source:
    """A backend under test. `max_error` is the limit per pixel, for backends that use the common filter and decoder."""

    open: Callable[[ImageIndex, int], CropSource]
    needs: str | None = None
    max_error: float | None = 1.01
    device: torch.device = CPU


def _dali(index: ImageIndex, side: int, resize_by_dali: bool, device: torch.device = CPU) -> CropSource:
    from pipelines.backends.dali import DaliCrops

    return DaliCrops(index, side, device, 2, resize_by_dali)


def _ffcv(index: ImageIndex, side: int) -> CropSource:
    from pipelines.backends.ffcv import FfcvCrops

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "images.beton")
        convert(index, Settings(data=(index.name,), out=path, workers=2), Console(quiet=True))
        return FfcvCrops(read_index(path), side, CPU, 2)  # which keeps the file open


SOURCES = {
    "resident": Source(lambda index, side: ResidentCrops(index, side, CPU, 2)),
    "torch-0": Source(lambda index, side: TorchCrops(index, side, CPU, 0)),
    "torch-1": Source(lambda index, side: TorchCrops(index, side, CPU, 1)),
    "torch-2": Source(lambda index, side: TorchCrops(index, side, CPU, 2)),
    "dali": Source(partial(_dali, resize_by_dali=False), needs="dali"),
    "dali-resized": Source(partial(_dali, resize_by_dali=True), needs="dali", max_error=None),  # as on a GPU
    # nvJPEG rounds differently from libjpeg-turbo
    "dali-cuda": Source(partial(_dali, resize_by_dali=True, device=CUDA), needs="dali", max_error=None, device=CUDA),
    "ffcv": Source(_ffcv, needs="ffcv"),
}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.gpu) if SOURCES[name].device == CUDA else name for name in SOURCES]
)
def source(request: pytest.FixtureRequest, require_backend: Callable[[str], None]) -> Source:
    chosen = SOURCES[request.param]
    if chosen.needs:
        require_backend(chosen.needs)
    return chosen


@pytest.fixture(autouse=True)
def no_children_left() -> Iterator[None]:
    """After every test, the workers of its sources are gone."""
    yield
    if active_children():  # an iterator in a reference cycle may still hold them
        gc.collect()
    assert active_children() == []


def index_of(paths: list[Path]) -> ImageIndex:
    names = [str(path) for path in paths]
    sizes, bad = read_headers(names)
    assert not bad
    return ImageIndex("test", sizes, paths=tuple(names))


@pytest.fixture(scope="module")
def uniform() -> ImageIndex:
    pixels = np.stack([np.roll(picture(20, 28), 3 * i, axis=1) ^ np.uint8(i) for i in range(80)])
    return ImageIndex.from_pixels("uniform", pixels)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """Files of all sizes and aspect ratios, including a single pixel."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = [(1, 1), (1, 60), (60, 1), (2, 3), *((8 + 3 * i, 70 - 2 * i) for i in range(26))]
    for i, (height, width) in enumerate(sizes):
        (folder / f"{i:02}.png").write_bytes(encode(picture(height + 1, width + 1)[1:, 1:], "PNG"))
    return index_of(sorted(folder.iterdir()))


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """Images whose pixels depend on choices: 12 bits in 16, signed, and truncated."""
    folder, rgb = tmp_path_factory.mktemp("chosen"), picture(30, 44)
    deep = rgb.astype(np.uint16) * 16
    (folder / "0.png").write_bytes(png(deep, 16, 2))
    (folder / "1.png").write_bytes(png(deep[..., :1], 16, 0))
    (folder / "2.tif").write_bytes(tiff(deep.astype(np.int16), 2, planar=True, compression="lzw"))
    (folder / "3.tif").write_bytes(tiff(deep[..., :1].astype(np.float32), 1))
    noise = np.random.Generator(np.random.Philox(7)).integers(0, 256, rgb.shape, np.uint8)
    (folder / "4.jpg").write_bytes(encode(noise, "JPEG", quality=95)[:-900])
    (folder / "5.png").write_bytes(encode(noise, "PNG")[:-900])
    (folder / "6.png").write_bytes(encode(rgb, "PNG"))
    decoding = Decoding(value_range=(0, 4080), truncated="accept")
    names = tuple(str(path) for path in sorted(folder.iterdir()))
    headers = inspect_headers(names, decoding)
    assert not headers.bad
    assert headers.deep == [0, 1, 2, 3]
    assert [row for row, _ in headers.tolerated] == [4, 5]
    return ImageIndex("chosen", headers.sizes, paths=names, decoding=decoding)


def test_choices_of_decoding_hold_on_every_pipeline(source: Source, chosen: ImageIndex):
    """A value range and truncated images give the same views everywhere."""
    rgb = picture(30, 44)
    np.testing.assert_array_equal(chosen.read(0), rgb)
    np.testing.assert_array_equal(chosen.read(2), rgb)
    np.testing.assert_array_equal(chosen.read(6), rgb)
    plan = next(iter(eval_plans(chosen.sizes, np.arange(7), 7, 24)))
    (crops,) = source.open(chosen, 24).crops([plan])
    assert_pixels_agree(source, chosen, plan, crops.images.cpu())


def planner_of(index: ImageIndex, batch: int, augmentation: Augmentation = V2) -> Planner:
    return Planner(index.sizes, seed=5, batch_size=batch, augmentation=augmentation, shuffle_keys=True)


def assert_pixels_agree(source: Source, index: ImageIndex, plan: BatchPlan, images: torch.Tensor) -> None:
    views, count, side = images.shape[:3]
    assert images.shape == (views, count, side, side, 3)
    assert images.dtype == torch.uint8
    error = errors(index, plan, images)
    assert error.mean() <= 2
    assert (error <= 12).mean() >= 0.999
    if source.max_error is not None:
        assert error.max() <= source.max_error


def kept(views: Iterator[Views]) -> list[Views]:
    """Copies on the CPU, as a pipeline on a GPU overwrites its views."""
    return [Views(*(t.cpu() for t in (v.query, v.key, v.key_order, v.index))) for v in views]


def assert_same(actual: Views, expected: Views) -> None:
    for field in ("query", "key", "key_order", "index"):
        assert torch.equal(getattr(actual, field), getattr(expected, field)), field


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "mixed"])
def test_crops_match_the_plan(source: Source, kind: str, request: pytest.FixtureRequest) -> None:
    """Every plan once and in order, every row its own image; batches are no multiple of a worker's chunk."""
    index: ImageIndex = request.getfixturevalue(kind)
    planner = planner_of(index, min(CHUNK + 7, len(index)))
    opened = source.open(index, 16)
    if isinstance(opened, TorchCrops):
        opened.images_per_task = CHUNK  # small images have larger tasks
    crops = list(opened.crops(planner.plans(3, 6)))
    opened.close()
    assert [c.plan.step for c in crops] == [3, 4, 5]
    for c in crops:
        expected = planner.plan(c.plan.step)
        for field in ("indices", "boxes", "params", "key_order"):
            np.testing.assert_array_equal(getattr(c.plan, field), getattr(expected, field))
        assert_pixels_agree(source, index, c.plan, c.images)


@pytest.mark.parametrize(
    ("pattern", "count", "side"),
    [
        ("cifar10/train/*/*.jpg", 48, 32),
        pytest.param("imagenette/val/*/*.JPEG", 8, 224, marks=pytest.mark.slow),
        pytest.param("imagenet-60/*.JPEG", 8, 224, marks=pytest.mark.slow),
    ],
)
def test_photographs(source: Source, test_data: Path, pattern: str, count: int, side: int) -> None:
    index = index_of(random.Random(0).sample(sorted(test_data.glob(pattern)), count))
    (crops,) = source.open(index, side).crops(planner_of(index, count).plans(0, 1))
    assert_pixels_agree(source, index, crops.plan, crops.images)


def test_odd_files(source: Source, tmp_path: Path) -> None:
    """Every format, depth and orientation, made upright before cropping."""
    index = index_of(write_files(tmp_path, good_files()))
    (crops,) = source.open(index, 24).crops(planner_of(index, len(index)).plans(0, 1))
    assert_pixels_agree(source, index, crops.plan, crops.images)


def test_evaluation_plans_have_one_view(source: Source, mixed: ImageIndex) -> None:
    crops = list(source.open(mixed, 16).crops(eval_plans(mixed.sizes, np.arange(30), 13, 16)))
    assert [len(c.images[0]) for c in crops] == [13, 13, 4]
    for c in crops:
        assert_pixels_agree(source, mixed, c.plan, c.images)


# ---- views -----------------------------------------------------------------------------------------------------------


def test_views_resumed_in_the_middle_equal_the_rest(source: Source, mixed: ImageIndex) -> None:
    """Across the end of an epoch, and while the earlier iterator is still in use."""
    opened = source.open(mixed, 16)
    pipeline = TwoViewPipeline(planner_of(mixed, 12), opened, source.device, torch.float32)
    views = pipeline.views(0, 5)
    head = kept(itertools.islice(views, 2))
    resumed = kept(pipeline.views(2, 5))
    rest = kept(views)
    assert len(head) + len(rest) == 5
    for actual, expected in zip(resumed, rest, strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("augmentation", [V2, PLAIN_TURNED], ids=lambda a: a.name)
def test_every_source_gives_the_views_of_resident(
    source: Source, mixed: ImageIndex, augmentation: Augmentation
) -> None:
    """The same seed gives the same crops and colours, so accuracy does not depend on the backend."""
    planner = planner_of(mixed, 12, augmentation)
    resident = TwoViewPipeline(planner, SOURCES["resident"].open(mixed, 16), CPU, torch.float32)
    other = TwoViewPipeline(planner, source.open(mixed, 16), source.device, torch.float32)
    for actual, expected in zip(kept(other.views(0, 2)), resident.views(0, 2), strict=True):
        assert torch.equal(actual.index, expected.index)
        assert torch.equal(actual.key_order, expected.key_order)
        for a, b in ((actual.query, expected.query), (actual.key, expected.key)):
            assert a.is_contiguous(memory_format=torch.channels_last)
            assert (a - b).abs().mean() < 2 / 255 / np.mean(augmentation.std)  # of the normalised values


def test_a_key_belongs_to_the_query_in_row_key_order(uniform: ImageIndex) -> None:
    """With boxes of the whole image and no colour, the key is the query of row key_order[r]."""
    plain = Augmentation(name="plain", scale=(1.0, 1.0), ratio=(1.4, 1.4), flip_p=0, jitter_p=0, grey_p=0)
    pipeline = TwoViewPipeline(
        planner_of(uniform, 16, plain), SOURCES["resident"].open(uniform, 16), CPU, torch.float32
    )
    views = next(pipeline.views(0, 1))
    assert not torch.equal(views.key_order, torch.arange(16))
    assert torch.equal(views.key, views.query[views.key_order])


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_bad_image_is_named(source: Source, tmp_path: Path) -> None:
    """An image with a valid header, which only fails on decoding."""
    (bad,) = (file for file in bad_files() if not file.in_header)
    good = good_files()[:5]
    index = index_of(write_files(tmp_path, good) + write_files(tmp_path, [bad]))
    with pytest.raises(DataError, match=r"bit-flipped\.png is not a usable image") as raised:
        list(source.open(index, 16).crops(planner_of(index, 3).plans(0, 4)))
    assert "\n" not in str(raised.value)
    assert active_children() == []


def test_an_image_that_vanishes_is_named(source: Source, tmp_path: Path) -> None:
    paths = write_files(tmp_path, good_files()[:4])
    index = index_of(paths)
    paths[2].unlink()
    with pytest.raises(DataError, match=paths[2].name):
        list(source.open(index, 16).crops(planner_of(index, 4).plans(0, 1)))


def test_an_image_that_changes_size_is_named(source: Source, tmp_path: Path) -> None:
    paths = write_files(tmp_path, good_files()[:4])
    index = index_of(paths)
    paths[1].write_bytes(encode(picture(99, 99), "PNG"))
    with pytest.raises(DataError, match=f"{paths[1].name} is 99×99 pixels and was"):
        list(source.open(index, 16).crops(planner_of(index, 4).plans(0, 1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_names_a_bad_image(tmp_path: Path, workers: int) -> None:
    (bad,) = (file for file in bad_files() if not file.in_header)
    index = index_of(write_files(tmp_path, [*good_files()[:3]]) + write_files(tmp_path, [bad]))
    pipeline = DataLoaderPipeline(index, planner_of(index, 4), 16, CPU, torch.float32, workers)
    with pytest.raises(DataError, match=r"bit-flipped\.png is not a usable image"):
        list(pipeline.views(0, 1))


@pytest.mark.parametrize(("side", "images"), [(32, 4 * CHUNK), (50, 52), (500, CHUNK)])
def test_small_images_have_larger_tasks(side: int, images: int) -> None:
    index = ImageIndex("files", np.full((3, 2), side, dtype=np.int32), paths=("a", "b", "c"))
    assert TorchCrops(index, 16, CPU, 0).images_per_task == images


def test_abandoning_an_iterator_ends_the_workers(uniform: ImageIndex) -> None:
    crops = SOURCES["torch-2"].open(uniform, 16).crops(planner_of(uniform, 40).plans(0, 1000))
    next(crops)
    assert len(active_children()) == 2
    del crops
    gc.collect()
    assert active_children() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "dataloader"])
def test_a_killed_worker_ends_the_run_at_once(uniform: ImageIndex, name: str) -> None:
    planner = planner_of(uniform, 40)
    if name == "torch":
        batches = TorchCrops(uniform, 16, CPU, 2).crops(planner.plans(0, 10**6))
    else:
        batches = DataLoaderPipeline(uniform, planner, 16, CPU, torch.float32, 2).views(0, 10**6)
    next(batches)
    pid = active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"DataLoader worker .*{pid}.*restart with --resume") as raised:
        list(itertools.takewhile(lambda _: time.monotonic() - began < 30, batches))
    assert time.monotonic() - began < 30
    assert active_children() == [], "the other worker ends with it"
    assert "\n" not in str(raised.value)


# ---- the baseline ----------------------------------------------------------------------------------------------------


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic: the largest difference of two empirical distribution functions."""
    values = np.sort(np.concatenate([a, b]))
    return float(
        np.abs(
            np.searchsorted(np.sort(a), values, "right") / len(a)
            - np.searchsorted(np.sort(b), values, "right") / len(b)
        ).max()
    )


@pytest.mark.parametrize("augmentation", [V1, V2, CIFAR, PLAIN_TURNED], ids=lambda a: a.name)
def test_dataloader_draws_from_the_same_distribution(augmentation: Augmentation) -> None:
    """Six images, 360 views of each pipeline: means, standard deviations and horizontal gradients, and all pixels."""
    pixels = np.stack(
        [np.roll(picture(24, 30), 5 * i, axis=1)[:, :, [i % 3, (i + 1) % 3, (i + 2) % 3]] for i in range(6)]
    )
    index = ImageIndex.from_pixels("six", pixels)
    planner = planner_of(index, 6, augmentation)
    torch.manual_seed(0)
    random.seed(0)
    pipelines = (
        TwoViewPipeline(planner, ResidentCrops(index, 16, CPU, 1), CPU, torch.float32),
        DataLoaderPipeline(index, planner, 16, CPU, torch.float32, 0),
    )
    ours, baseline = (
        torch.cat([torch.cat([v.query, v.key]) for v in pipeline.views(0, 30)]).numpy() for pipeline in pipelines
    )
    limit = 2.2 * np.sqrt(2 / 360)  # exceeded by chance once in 10⁴
    for channel in range(3):
        a, b = ours[:, channel], baseline[:, channel]
        for statistic in (
            lambda x: x.mean(axis=(1, 2)),
            lambda x: x.std(axis=(1, 2)),
            lambda x: (x[:, :, 8:] - x[:, :, :8]).mean(axis=(1, 2)),
        ):
            assert distance(statistic(a), statistic(b)) < limit
        assert distance(a.ravel(), b.ravel()) < 0.06


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_gives_the_planned_images_and_key_order(mixed: ImageIndex, workers: int) -> None:
    planner = planner_of(mixed, 8)
    batches = list(DataLoaderPipeline(mixed, planner, 16, CPU, torch.bfloat16, workers).views(2, 5))
    assert len(batches) == 3
    for step, views in enumerate(batches, 2):
        np.testing.assert_array_equal(views.index.numpy(), planner.indices(step))
        np.testing.assert_array_equal(views.key_order.numpy(), planner.key_order(step))
        for images in (views.query, views.key):
            assert images.shape == (8, 3, 16, 16)
            assert images.dtype == torch.bfloat16
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_dataloader_shuffles_its_keys_like_the_others(uniform: ImageIndex) -> None:
    plain = Augmentation(name="plain", scale=(1.0, 1.0), ratio=(1.4, 1.4), flip_p=0, jitter_p=0, grey_p=0)
    views = next(DataLoaderPipeline(uniform, planner_of(uniform, 16, plain), 16, CPU, torch.float32, 0).views(0, 1))
    assert not torch.equal(views.key_order, torch.arange(16))
    assert torch.equal(views.key, views.query[views.key_order])
