"""Crops from a `.beton` file match the common definition: `decode.decode`, the plan's box, a triangle filter."""

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from pipelines.augment.presets import CIFAR
from pipelines.backends import ffcv as ffcv_backend
from pipelines.backends.ffcv import FfcvCrops
from pipelines.data.beton import read_index
from pipelines.data.headers import read_headers
from pipelines.data.index import ImageIndex
from pipelines.errors import BackendMissingError, DataError
from pipelines.plan.planner import Planner, eval_plans
from pipelines.views import BatchPlan
from tests.oddities import encode, good_files, picture, write_files
from tests.reference_crops import errors
from tools.make_ffcv import Settings, convert

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[3]


needs_ffcv = pytest.mark.usefixtures("ffcv")


@pytest.fixture
def ffcv(require_backend):
    require_backend("ffcv")


def index_of(paths: list[Path]) -> ImageIndex:
    names = [str(path) for path in paths]
    sizes, bad = read_headers(names)
    assert not bad
    return ImageIndex("test", sizes, paths=tuple(names))


def converted(index: ImageIndex, folder: Path, **changes) -> ImageIndex:
    out = str(folder / f"{len(list(folder.iterdir()))}.beton")
    convert(index, Settings(data=(str(folder),), out=out, workers=1, **changes), Console(quiet=True))
    return read_index(out)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> ImageIndex:
    """24 drawn JPEGs of all sizes around 50 pixels, converted."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "data").mkdir()
    for i in range(24):
        (folder / "data" / f"{i:02}.jpg").write_bytes(encode(picture(40 + i, 70 - 2 * i), "JPEG"))
    return converted(index_of(sorted((folder / "data").iterdir())), folder)


def plan_of(indices: np.ndarray, boxes: np.ndarray) -> BatchPlan:
    views, count = boxes.shape[:2]
    return BatchPlan(0, 0, indices, boxes.astype(np.int32), np.zeros((views, count, 0), np.float32), np.arange(count))


@needs_ffcv
@pytest.mark.parametrize(
    ("pattern", "count", "side"),
    [
        ("cifar10/train/*/*.jpg", 96, 32),
        pytest.param("imagenette/val/*/*.JPEG", 12, 224, marks=pytest.mark.slow),
        pytest.param("imagenet-60/*.JPEG", 12, 224, marks=pytest.mark.slow),
    ],
)
def test_photographs(test_data, tmp_path, pattern, count, side):
    """Against the pixels of the folder. The limits are 2 in the mean and 12 for 99.9 %; libjpeg-turbo achieves ½."""
    folder = index_of(random.Random(0).sample(sorted(test_data.glob(pattern)), count))
    planner = Planner(folder.sizes, seed=3, batch_size=count, augmentation=CIFAR, shuffle_keys=False)
    source = FfcvCrops(converted(folder, tmp_path), side, CPU, 2)
    for crops in source.crops(planner.plans(0, 2)):
        assert crops.images.shape == (2, count, side, side, 3)
        assert crops.images.dtype == torch.uint8
        difference = errors(folder, crops.plan, crops.images)
        assert difference.mean() < 0.5
        assert (difference > 12).mean() <= 1e-3
    source.close()


@needs_ffcv
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_odd_files(tmp_path, mode):
    """Every kind of file and EXIF orientation, whole and off-centre, enlarged and reduced: rounded once."""
    folder = index_of(write_files(tmp_path, good_files()))
    corner, zeros = folder.sizes // (4, 8), np.zeros_like(folder.sizes)
    box = np.concatenate([corner, np.maximum(1, folder.sizes // (2, 3))], axis=1)
    point = np.concatenate([folder.sizes - 1, np.ones_like(folder.sizes)], axis=1)
    plan = plan_of(np.arange(len(folder)), np.stack([np.concatenate([zeros, folder.sizes], axis=1), box, point]))
    index = converted(folder, tmp_path, mode=mode)
    for side in (1, 24, 61):
        source = FfcvCrops(index, side, CPU, 1)
        (crops,) = source.crops([plan])
        worst = errors(folder, plan, crops.images).max(axis=(2, 3, 4)).max(axis=0)
        assert {index.display_name(i): error for i, error in enumerate(worst) if error > 0.501} == {}
        source.close()


@needs_ffcv
def test_plans_of_any_sizes_come_in_order(drawn):
    """Eval plans of one view with a smaller last batch, while another iterator is half-way through larger batches."""
    source = FfcvCrops(drawn, 16, CPU, 2)
    planner = Planner(drawn.sizes, seed=0, batch_size=20, augmentation=CIFAR, shuffle_keys=False)
    training = source.crops(planner.plans(0, 5))
    first = next(training)
    evaluated = list(source.crops(eval_plans(drawn.sizes, np.arange(24), 7, 16)))
    assert [len(crops.plan.indices) for crops in evaluated] == [7, 7, 7, 3]
    assert np.concatenate([crops.plan.indices for crops in evaluated]).tolist() == list(range(24))
    trained = [first, *training]
    assert [crops.plan.step for crops in trained] == [0, 1, 2, 3, 4]
    for crops in (*evaluated, *trained):
        assert errors(drawn, crops.plan, crops.images).max() < 0.501
    source.close()


@needs_ffcv
def test_a_kept_batch_is_not_overwritten(drawn):
    """Memory is reused, but not while a tensor, or a view of one, refers to it."""
    planner = Planner(drawn.sizes, seed=0, batch_size=20, augmentation=CIFAR, shuffle_keys=False)
    source = FfcvCrops(drawn, 16, CPU, 2)
    kept, copies = [], []
    for crops in source.crops(planner.plans(0, 30)):
        if crops.plan.step % 3 == 0:
            kept.append(crops.images[1, 2:])
            copies.append(kept[-1].clone())
    source.close()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    assert not torch.equal(kept[0], kept[1])


@needs_ffcv
def test_the_same_crops_for_any_number_of_threads(drawn):
    planner = Planner(drawn.sizes, seed=0, batch_size=23, augmentation=CIFAR, shuffle_keys=False)
    results = []
    for workers in (0, 1, 5):
        source = FfcvCrops(drawn, 16, CPU, workers)
        results.append([crops.images.clone() for crops in source.crops(planner.plans(0, 3))])
        source.close()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_ffcv
def test_no_threads_or_open_files_are_left(drawn):
    """Whether an iterator was exhausted, abandoned or never started."""
    planner = Planner(drawn.sizes, seed=0, batch_size=8, augmentation=CIFAR, shuffle_keys=False)
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        source = FfcvCrops(drawn, 16, CPU, 3)
        abandoned = source.crops(planner.plans(0, 10**6))
        next(abandoned)
        list(source.crops(planner.plans(0, 2)))
        source.crops(planner.plans(0, 2))
        source.close()
        source.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


@needs_ffcv
def test_a_file_that_became_shorter_is_named(drawn, tmp_path):
    assert drawn.records is not None
    path = tmp_path / "cut.beton"
    for suffix in ("", ".json"):
        Path(f"{path}{suffix}").write_bytes(Path(f"{drawn.records.paths[0]}{suffix}").read_bytes())
    index = read_index(str(path))
    assert index.records is not None
    source = FfcvCrops(index, 16, CPU, 2)
    os.truncate(path, int(index.records.offsets[20]) + 5)
    plans = list(eval_plans(index.sizes, np.arange(24), 24, 16))
    with pytest.raises(DataError, match=r"cannot read .*2\d\.jpg in .*cut\.beton \(the file is too short\)"):
        list(source.crops(plans))
    source.close()


@needs_ffcv
def test_a_replaced_image_is_named(drawn, tmp_path):
    """The compiled code trusts no header: a JPEG of another size would be written past its buffer."""
    assert drawn.records is not None
    path = tmp_path / "other.beton"
    for suffix in ("", ".json"):
        Path(f"{path}{suffix}").write_bytes(Path(f"{drawn.records.paths[0]}{suffix}").read_bytes())
    index = read_index(str(path))
    assert index.records is not None
    source = FfcvCrops(index, 16, CPU, 2)
    other = encode(picture(400, 300), "JPEG", quality=1)[: index.records.lengths[3]]
    with path.open("r+b") as file:
        file.seek(index.records.offsets[3])
        file.write(other)
    with pytest.raises(DataError, match=r"03\.jpg in .*other\.beton is"):
        list(source.crops(eval_plans(index.sizes, np.arange(24), 24, 16)))
    source.close()


@needs_ffcv
def test_warnings_of_the_decoder_do_not_change_pixels(tmp_path):
    """libjpeg-turbo decodes damaged data with a warning: the pixels are then those of `decode.decode`."""
    paths = []
    for i in range(12):
        data = bytearray(encode(picture(60, 90), "JPEG"))
        scan = data.index(b"\xff\xda") + 14
        data[scan + 20 * i : scan + 20 * i + 4] = b"\x00\x12\x34\x56"
        paths.append(tmp_path / f"{i:02}.jpg")
        paths[-1].write_bytes(data)
    folder = index_of(paths)
    index = converted(folder, tmp_path)
    source = FfcvCrops(index, 24, CPU, 1)
    (crops,) = source.crops(eval_plans(index.sizes, np.arange(12), 12, 24))
    assert errors(folder, crops.plan, crops.images).max() < 0.501
    source.close()


QUIET = """
import sys
import numpy, torch
torch.set_num_threads(2)
from pipelines.data.beton import read_index
from pipelines.backends.ffcv import FfcvCrops
from pipelines.plan.planner import eval_plans
index = read_index(sys.argv[1])
source = FfcvCrops(index, 16, torch.device("cpu"), 2)
list(source.crops(eval_plans(index.sizes, numpy.arange(4), 4, 16)))
import numba
print(torch.get_num_threads(), numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS, "cv2" in sys.modules)
"""


@needs_ffcv
@pytest.mark.slow
def test_global_settings_do_not_change(drawn):
    """FFCV's package sets the thread counts of torch and numba to 1, for the whole process."""
    assert drawn.records is not None
    command = [sys.executable, "-W", "error", "-c", QUIET, drawn.records.paths[0]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 True False\n", done.stderr


def test_without_ffcv_the_message_has_the_install_command(drawn, monkeypatch):
    monkeypatch.setattr(ffcv_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BackendMissingError, match="libturbojpeg0-dev` and, in a checkout of fastmoco, `uv sync --inexact --extra ffcv`"
    ):
        FfcvCrops(drawn, 16, CPU, 1)


def test_without_a_beton_file_the_message_has_the_conversion_command():
    index = ImageIndex.from_pixels("cifar10", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"cifar10 is not one: convert it with `python tools/make_ffcv\.py"):
        FfcvCrops(index, 16, CPU, 1)
