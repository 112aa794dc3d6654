"""DALI's crops match the common definition: `decode.decode`, the plan's box, an antialiased triangle filter."""

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.presets import CIFAR
from pipelines.backends.dali import DaliCrops
from pipelines.data.headers import read_headers
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError, DataError
from pipelines.plan.planner import Planner, eval_plans
from pipelines.views import BatchPlan
from tests.oddities import bad_files, encode, good_files, picture, write_files
from tests.reference_crops import errors

CPU = torch.device("cpu")
BAD = bad_files()
needs_dali = pytest.mark.usefixtures("dali")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.fixture
def dali(require_backend):
    require_backend("dali")


def index_of(paths: list[Path]) -> ImageIndex:
    names = [str(path) for path in paths]
    sizes, bad = read_headers(names)
    assert not bad
    return ImageIndex("test", sizes, paths=tuple(names))


def plan_of(boxes: np.ndarray) -> BatchPlan:
    """A plan for the first B images: boxes (V, B, 4)."""
    views, count = boxes.shape[:2]
    rows = np.arange(count)
    return BatchPlan(0, 0, rows, boxes.astype(np.int32), np.zeros((views, count, 0), np.float32), rows)


def corpus_boxes(sizes: np.ndarray) -> np.ndarray:
    """(2, B, 4): the whole image, and an off-centre box."""
    zeros = np.zeros_like(sizes)
    box = np.concatenate([sizes // (4, 8), np.maximum(1, sizes // (2, 3))], axis=1)
    return np.stack([np.concatenate([zeros, sizes], axis=1), box])


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("pattern", "count", "side"),
    [
        ("cifar10/train/*/*.jpg", 96, 32),
        pytest.param("imagenette/val/*/*.JPEG", 12, 224, marks=pytest.mark.slow),
        pytest.param("imagenet-60/*.JPEG", 12, 224, marks=pytest.mark.slow),
    ],
)
def test_photographs(test_data, pattern, count, side, device):
    """On the CPU both decoders are libjpeg-turbo; the GPU's rounds differently."""
    index = index_of(random.Random(0).sample(sorted(test_data.glob(pattern)), count))
    planner = Planner(index.sizes, seed=3, batch_size=count, augmentation=CIFAR, shuffle_keys=False)
    for crops in DaliCrops(index, side, device, 2).crops(planner.plans(0, 2)):
        assert crops.images.shape == (2, count, side, side, 3)
        assert crops.images.dtype == torch.uint8
        assert crops.images.device.type == device.type
        difference = errors(index, crops.plan, crops.images)
        assert difference.mean() <= (0.5 if device == CPU else 2)
        assert (difference > 12).mean() <= 1e-3


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
def test_odd_files(tmp_path, device):
    """Every kind of file, and every EXIF orientation, matches `decode.decode`."""
    files = good_files()
    index = index_of(write_files(tmp_path, files))
    plan = plan_of(corpus_boxes(index.sizes))
    (crops,) = DaliCrops(index, 24, device, 2).crops([plan])
    worst = errors(index, plan, crops.images).mean(axis=(2, 3, 4)).max(axis=0)
    limit = 0.7 if device == CPU else 2
    assert {file.name: error for file, error in zip(files, worst, strict=True) if error > limit} == {}


@needs_dali
@pytest.mark.parametrize("file", BAD, ids=lambda file: file.name)
def test_a_bad_file_is_named(tmp_path, file):
    good = tmp_path / "good.jpg"
    good.write_bytes(encode(picture(200, 300), "JPEG"))
    paths = (str(good), *map(str, write_files(tmp_path, [file])), str(good))
    index = ImageIndex("bad", np.array([[200, 300]] * 3, dtype=np.int32), paths=paths)
    with pytest.raises(DataError, match=f"{file.name} is not a usable image.*{file.reason}"):
        list(DaliCrops(index, 24, CPU, 2).crops([plan_of(corpus_boxes(index.sizes))] * 3))


@needs_dali
def test_a_file_that_fails_only_on_decoding_is_named(tmp_path):
    """An invalid Huffman table: DALI fails, and its message does not name the file."""
    data = bytearray(encode(picture(200, 300), "JPEG"))
    (tmp_path / "good.jpg").write_bytes(data)
    table = data.index(b"\xff\xc4") + 5
    data[table : table + 16] = b"\xff" * 16
    (tmp_path / "bad.jpg").write_bytes(data)
    index = index_of([tmp_path / "good.jpg", tmp_path / "bad.jpg"])
    with pytest.raises(DataError, match=r"bad\.jpg is not a usable image.*Huffman"):
        list(DaliCrops(index, 24, CPU, 1).crops([plan_of(corpus_boxes(index.sizes))]))


@needs_dali
def test_files_that_change_or_vanish_are_named(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(picture(200, 300), "JPEG"))
    index = index_of([path])
    plan = plan_of(corpus_boxes(index.sizes))
    path.write_bytes(encode(picture(100, 300), "JPEG"))
    with pytest.raises(DataError, match=r"image\.jpg is 300×100 pixels and was 300×200"):
        list(DaliCrops(index, 24, CPU, 1).crops([plan]))
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*image\.jpg"):
        list(DaliCrops(index, 24, CPU, 1).crops([plan]))


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
def test_images_in_memory(device):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 12, 17, 3), dtype=np.uint8)
    index = ImageIndex.from_pixels("noise", pixels)
    planner = Planner(index.sizes, seed=1, batch_size=10, augmentation=CIFAR, shuffle_keys=True)
    for crops in DaliCrops(index, 8, device, 2).crops(planner.plans(0, 3)):
        difference = errors(index, crops.plan, crops.images)
        assert difference[:, :, 1:-1, 1:-1].max() <= 0.51
        assert difference.max() <= 255 / 6  # if 1/12 of the weight per axis is outside


@needs_dali
@pytest.mark.parametrize("device", DEVICES)
def test_evaluation_sees_every_image_once(tmp_path, device):
    """One view, and a smaller last batch; nothing is lost to DALI's prefetching."""
    paths = write_files(tmp_path, good_files()[:11])
    index = index_of(paths)
    plans = list(eval_plans(index.sizes, np.arange(11), 4, 16))
    crops = list(DaliCrops(index, 16, device, 2).crops(iter(plans)))
    assert [c.plan for c in crops] == plans
    assert [tuple(c.images.shape) for c in crops] == [(1, n, 16, 16, 3) for n in (4, 4, 3)]
    for c in crops:  # checked after the last: none was overwritten by DALI's next batch
        assert errors(index, c.plan, c.images).mean() <= (0.7 if device == CPU else 2)


@needs_dali
def test_no_plans_no_crops():
    index = ImageIndex.from_pixels("black", np.zeros((1, 4, 4, 3), np.uint8))
    assert list(DaliCrops(index, 4, CPU, 1).crops([])) == []


def test_missing_dali_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "pipelines.backends.dali")
    module = importlib.import_module("pipelines.backends.dali")  # needs no DALI
    index = ImageIndex.from_pixels("black", np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(BackendMissingError, match="uv sync --inexact --extra dali"):
        module.DaliCrops(index, 4, CPU, 1)


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to start on")
def test_a_device_that_dali_cannot_start_on_is_named():
    index = ImageIndex.from_pixels("black", np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(BackendMissingError, match=r"cannot start on cuda:0 .*CUDA is not available.*--pipeline torch"):
        list(DaliCrops(index, 4, torch.device("cuda:0"), 1).crops(eval_plans(index.sizes, np.arange(1), 1, 4)))
