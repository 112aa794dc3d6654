"""DALI's crops on a GPU: ordered on the device without a wait of the host, and equal to those on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines.augment.presets import CIFAR
from pipelines.backends import dali
from pipelines.backends.dali import DaliCrops
from pipelines.data.headers import read_headers
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from tests.oddities import encode, picture

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BUSY_CYCLES = 50_000_000  # about 25 ms of a GPU


class FakePipeline:
    """DALI's pipeline as seen from Python: `run` asks the source for a batch, and returns one output per view."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def set_outputs(self, *outputs: object) -> None:
        self.views = len(outputs)

    def build(self) -> None: ...

    def run(self, stream: object) -> tuple[MagicMock, ...]:
        next(self.events[0])
        self.events.append(("run", stream))
        return tuple(MagicMock(spec_set=["as_tensor"]) for _ in range(self.views))


def fake_dali(events: list[Any]) -> SimpleNamespace:
    """What `_dali` returns, without a GPU: the source, then every run, copy and release are recorded in `events`."""
    pipelines: list[weakref.ref[FakePipeline]] = []

    def make(**_: Any) -> FakePipeline:
        pipeline = FakePipeline(events)
        pipelines.append(weakref.ref(pipeline))
        return pipeline

    def external_source(*, source: Iterator[Any], num_outputs: int, no_copy: bool, **_: Any) -> list[MagicMock]:
        assert no_copy
        events.append(source)
        return [MagicMock() for _ in range(num_outputs)]

    def feed_ndarray(_: object, view: torch.Tensor, cuda_stream: object) -> None:
        assert view.is_contiguous()
        events.append(("copy", tuple(view.shape), cuda_stream))

    def release() -> None:
        events.append(("release", [pipeline() for pipeline in pipelines]))

    fn = MagicMock(external_source=external_source)
    return SimpleNamespace(
        Pipeline=make,
        fn=fn,
        types=MagicMock(),
        feed_ndarray=feed_ndarray,
        ReleaseUnusedMemory=release,
        TensorCPU=None,
        TensorListCPU=MagicMock(),
    )


def test_outputs_are_ordered_in_the_current_stream_without_a_wait(monkeypatch):
    """The streams have no `synchronize`, and another is current for every batch. At the end memory is given back."""
    events: list[Any] = []
    streams = [SimpleNamespace(cuda_stream=handle) for handle in (11, 22, 33)]
    namespace, current = fake_dali(events), MagicMock()
    monkeypatch.setattr(dali, "_dali", lambda: namespace)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(owner, "synchronize", lambda *_: pytest.fail("the host waits for the device"))
    index = ImageIndex.from_pixels("noise", np.zeros((8, 12, 12, 3), np.uint8))
    planner = Planner(index.sizes, seed=1, batch_size=4, augmentation=CIFAR, shuffle_keys=False)
    with FakeTensorMode():
        iterator = DaliCrops(index, 8, CUDA, 1).crops(planner.plans(0, 3))
        for stream in streams:
            current.return_value = stream
            batch = next(iterator)
            assert batch.images.device.type == "cuda"
            assert batch.images.shape == (2, 4, 8, 8, 3)
        iterator.close()
    copy = (4, 8, 8, 3)
    expected = [event for stream in streams for event in (("run", stream), *[("copy", copy, stream)] * 2)]
    assert events[1:] == [*expected, ("release", [None])]


@pytest.mark.gpu
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_crops_equal_those_of_the_cpu(tmp_path, require_backend, busy):
    """Also where the stream is so late that DALI has long made the next batches when it copies one.

    Both sides resize with DALI, so only the decoders differ. DALI's own tests allow a mean of 1 between nvJPEG with
    interpolated chroma and libjpeg-turbo: 1 level for each inverse DCT, times 1.8 in the conversion to RGB, is at most
    4 levels where chroma is smooth, and more at edges of colour. Crops of another image or box differ by 40.
    """
    require_backend("dali")
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.jpg") for i in range(96)]
    for i, path in enumerate(paths):
        image = np.roll(picture(40 + i % 50, 90 - i % 40), tuple(rng.integers(0, 40, 2)), axis=(0, 1))
        with open(path, "wb") as file:
            file.write(encode(image, "JPEG", quality=90, progressive=i % 7 == 0))
    sizes, _ = read_headers(paths)
    index = ImageIndex("photographs", sizes, paths=tuple(paths))
    planner = Planner(index.sizes, seed=3, batch_size=24, augmentation=CIFAR, shuffle_keys=False)
    expected = [crops.images for crops in DaliCrops(index, 32, CPU, 2, True).crops(planner.plans(0, 12))]
    iterator = DaliCrops(index, 32, CUDA, 2).crops(planner.plans(0, 12))
    made = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(10):  # the last two are never asked for
            if busy:
                torch.cuda._sleep(BUSY_CYCLES)
            made.append(next(iterator).images)
        iterator.close()
        made = [images.cpu() for images in made]
    for images, reference in zip(made, expected, strict=False):
        difference = (images.float() - reference.float()).abs()
        assert difference.mean() <= 1
        assert (difference > 12).float().mean() <= 1e-3
