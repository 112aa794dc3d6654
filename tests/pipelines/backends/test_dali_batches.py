"""What DALI is fed: headers are examined once per image, few batches are in flight, nothing is copied."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.augment.presets import CIFAR
from pipelines.backends.dali import DaliCrops, _dali
from pipelines.backends.dali_batches import DaliBatches
from pipelines.data import plain_jpeg
from pipelines.data.headers import read_headers
from pipelines.data.index import ImageIndex
from pipelines.data.plain_jpeg import JpegHeaders, PlainJpeg
from pipelines.errors import DataError
from pipelines.plan.planner import Planner, eval_plans
from pipelines.views import BatchPlan, Crops
from tests.oddities import encode, exif, good_files, picture, write_files
from tests.reference_crops import errors

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("dali")


@pytest.fixture
def dali(require_backend: Callable[[str], None]) -> None:
    require_backend("dali")


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bytes that `plain_jpeg` was given."""
    calls, examine = [], plain_jpeg.plain_jpeg
    monkeypatch.setattr(plain_jpeg, "plain_jpeg", lambda data: calls.append(data) or examine(data))
    return calls


def index_of(paths: list[Path]) -> ImageIndex:
    names = [str(path) for path in paths]
    sizes, bad = read_headers(names)
    assert not bad
    return ImageIndex("test", sizes, paths=tuple(names))


def all_images(index: ImageIndex, batch: int = 8) -> Iterator[BatchPlan]:
    """Every image once, one view."""
    return eval_plans(index.sizes, np.arange(len(index)), batch, 16)


def pixels(crops: Iterator[Crops]) -> torch.Tensor:
    return torch.cat([batch.images for batch in crops], dim=1)


def test_headers_are_examined_once(tmp_path, examined):
    """Also by another iterator of the same source. Images that DALI would decode differently are then not even read."""
    index = index_of(write_files(tmp_path, good_files()))
    source = DaliCrops(index, 16, CPU, 2)
    first = pixels(source.crops(all_images(index)))
    assert len(examined) == len(index)
    kinds = source._headers.kinds
    assert {1, 3, 6, 8, JpegHeaders.OTHER} <= set(kinds.tolist())
    again = pixels(source.crops(all_images(index)))
    assert len(examined) == len(index)
    assert torch.equal(again, first)
    for batch in source.crops(all_images(index)):
        assert errors(index, batch.plan, batch.images).mean() <= 0.7


def test_a_file_of_another_length_is_examined_again(tmp_path, examined):
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(picture(200, 300), "JPEG", exif=exif(6)))
    index = index_of([path])
    source = DaliCrops(index, 16, CPU, 1)
    list(source.crops(all_images(index)))
    path.write_bytes(encode(picture(300, 200), "JPEG"))  # the same upright size, without a rotation
    (batch,) = source.crops(all_images(index))
    assert len(examined) == 2
    assert errors(index, batch.plan, batch.images).mean() <= 0.7
    path.write_bytes(encode(picture(300, 200), "JPEG")[:-20])
    with pytest.raises(DataError, match=r"image\.jpg is not a usable image"):
        list(source.crops(all_images(index)))
    path.write_bytes(encode(picture(200, 200), "JPEG"))
    with pytest.raises(DataError, match=r"image\.jpg is 200×200 pixels and was 200×300"):
        list(source.crops(all_images(index)))


def test_a_file_that_was_unreadable_is_examined_when_it_is_back(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(picture(40, 50), "JPEG"))
    index = index_of([path])
    source = DaliCrops(index, 16, CPU, 1)
    path.rename(tmp_path / "away.jpg")
    with pytest.raises(DataError, match=r"cannot read .*image\.jpg"):
        list(source.crops(all_images(index)))
    (tmp_path / "away.jpg").rename(path)
    list(source.crops(all_images(index)))
    assert source._headers.kinds.tolist() == [1]


def test_headers_know_the_stored_size():
    headers = JpegHeaders(np.array([[30, 50], [30, 50]], dtype=np.int32))
    assert headers.examine(0, encode(picture(50, 30), "JPEG", exif=exif(6))) == 6
    assert headers.header(0) == PlainJpeg(50, 30, 6)
    assert headers.header(0).upright_size == (30, 50)
    assert headers.examine(1, encode(picture(50, 30), "JPEG")) == JpegHeaders.OTHER
    assert headers.kinds.tolist() == [6, JpegHeaders.OTHER]


@pytest.mark.parametrize("encoded", [False, True])
def test_loading_runs_a_bounded_number_of_batches_ahead(tmp_path, encoded):
    """One batch is yielded, two are in DALI at most, and one is being read."""
    if encoded:
        index = index_of(write_files(tmp_path, good_files()[:8]))
    else:
        index = ImageIndex.from_pixels("noise", np.zeros((8, 8, 8, 3), np.uint8))
    planner = Planner(index.sizes, seed=1, batch_size=4, augmentation=CIFAR, shuffle_keys=False)
    asked = 0

    def plans() -> Iterator[BatchPlan]:
        nonlocal asked
        for plan in planner.plans(0, 20):
            asked += 1
            yield plan

    taken = 0
    for taken, _ in enumerate(DaliCrops(index, 8, CPU, 2).crops(plans()), 1):
        time.sleep(0.001)  # threads, if any were unbounded, would run on
        assert asked <= min(20, taken + 3)
    assert taken == asked == 20


def test_files_reach_dali_without_a_copy(tmp_path):
    """DALI's list refers to the bytes as they were read, and lives as long as the batch is in DALI."""
    names = _dali()
    index = index_of(write_files(tmp_path, good_files()[:4]))
    (plan,) = all_images(index)
    addresses = []

    def as_tensor(data: bytes) -> Any:
        addresses.append(np.frombuffer(data, np.uint8).ctypes.data)
        return names.TensorCPU(data)

    as_list = partial(names.TensorListCPU, contiguous=False)
    headers = JpegHeaders(index.sizes)
    batches = DaliBatches(index, headers, plan, iter(()), threads=1, corners=True, as_tensor=as_tensor, as_list=as_list)
    images, corner, extent = next(batches)
    batches.close()
    assert [images[row].data_ptr() for row in range(4)] == addresses
    assert batches.issued[0].inputs[0] is images
    np.testing.assert_array_equal(np.concatenate([corner, extent], axis=1), batches.issued[0].boxes[0])


def test_iterators_are_independent_and_end_their_threads():
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    index = ImageIndex.from_pixels("noise", images)
    planner = Planner(index.sizes, seed=1, batch_size=8, augmentation=CIFAR, shuffle_keys=False)
    source = DaliCrops(index, 8, CPU, 2)
    alone = [crops.images for crops in source.crops(planner.plans(0, 8))]
    gc.collect()  # an exception of another test may still hold a pipeline
    before = len(threads())
    gc.disable()  # threads end with their iterator, not with some later collection
    try:
        first, second = source.crops(planner.plans(0, 8)), source.crops(planner.plans(4, 8))
        assert torch.equal(next(first).images, alone[0])
        assert torch.equal(next(second).images, alone[4])
        assert torch.equal(next(first).images, alone[1])
        assert len(threads()) > before
        first.close()  # in the middle of an epoch, with a batch in progress
        assert torch.equal(next(second).images, alone[5])
        rest = [torch.equal(crops.images, images) for crops, images in zip(second, alone[6:], strict=True)]
        assert rest == [True, True]
        source.close()
        deadline = time.monotonic() + 30  # the kernel lists a thread for a moment after it was joined
        while len(threads()) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(threads()) == before
    finally:
        gc.enable()


def threads() -> list[str]:
    """The names of the running threads of DALI and of its readers."""
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("read_")]
    for task in os.listdir("/proc/self/task"):
        try:
            name = Path(f"/proc/self/task/{task}/comm").read_text().strip()
        except OSError:  # it has just ended
            continue
        if "DALI" in name:
            names.append(name)
    return names
