"""Evaluation during training with little memory: fewer images or none, which is said, and training goes on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmoco.cli import main
from fastmoco.config import DataConfig, RunConfig, RunOptions
from fastmoco.distributed.launch import RankInfo
from fastmoco.distributed.world import World
from fastmoco.errors import DeviceError, ExitCode
from fastmoco.evaluation import budget, knn_distributed, online
from fastmoco.evaluation.budget import SharedOutOfMemoryError
from fastmoco.evaluation.online import OnlineEvaluator
from fastmoco.run.resolve import resolve
from pipelines.augment.presets import CIFAR
from pipelines.backends.resident import ResidentCrops
from pipelines.backends.two_view import TwoViewPipeline
from pipelines.data.index import Dataset, ImageIndex
from pipelines.data.shapes import CLASS_NAMES, make_shapes
from pipelines.plan.planner import Planner
from pipelines.views import BatchPlan, Crops

CPU = torch.device("cpu")
SIDE = 16
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 718.28 GiB")


class Encoder(torch.nn.Module):
    """Twelve features: the mean colours of the quarters of a view; `features` can be replaced."""

    feature_dim = 12

    def features(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


class WideEncoder(Encoder):
    """As many features as ResNet-50."""

    feature_dim = 2048

    def features(self, images: Tensor) -> Tensor:
        return super().features(images)[:, :1].expand(-1, 2048)


class GreySource:
    """Crops of a uniform grey, without an image."""

    def __init__(self, side: int) -> None:
        self.side = side

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        grey = torch.full((1, 1, 1, 1, 1), 128, dtype=torch.uint8)
        return (Crops(grey.expand(1, len(plan.indices), self.side, self.side, 3), plan) for plan in plans)

    def close(self) -> None:
        pass


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest storage that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def evaluator_of(
    dataset: Dataset, source: Any = None, *, side: int = SIDE, knn_k: int = 5
) -> tuple[OnlineEvaluator, Callable[[], list[str]]]:
    """An evaluator, and a function that returns the lines printed since its last call."""
    run = RunOptions(knn_k=knn_k, knn_on="features")
    config = RunConfig(data=DataConfig(pipeline="resident", workers=1), run=run).replace(batch_size=32, crop_size=side)
    resolved, _ = resolve(config, dataset.train, CPU)
    source = source or ResidentCrops(dataset.train, side, CPU, 1)
    planner = Planner(dataset.train.sizes[:64], seed=0, batch_size=32, augmentation=CIFAR, shuffle_keys=True)
    pipeline, text = TwoViewPipeline(planner, source, CPU, torch.float32), io.StringIO()
    console = Console(file=text, width=400)
    evaluator = OnlineEvaluator(resolved, dataset, source, pipeline, CIFAR, World(CPU), torch.float32, console)

    def printed() -> list[str]:
        lines = text.getvalue().splitlines()
        text.truncate(0)
        text.seek(0)
        return lines

    return evaluator, printed


@pytest.fixture
def shapes() -> Dataset:
    pixels, labels = make_shapes(1_200, size=SIDE)
    parts = [
        ImageIndex.from_pixels("shapes", pixels[p], labels[p], CLASS_NAMES) for p in (slice(1000), slice(1000, 1200))
    ]
    return Dataset(parts[0], parts[1])


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The memory that is free, of which a half is the budget; without a limit at first."""
    memory = SimpleNamespace(bytes=2**50)
    monkeypatch.setattr(budget, "free_bytes", lambda _: memory.bytes)
    return memory


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(images, batch size) of every extraction."""
    calls: list[tuple[int, int]] = []
    original = online.extract

    def extract(function: Any, source: Any, index: Any, positions: np.ndarray, *rest: Any) -> Tensor:
        calls.append((len(positions), rest[-1]))
        return original(function, source, index, positions, *rest)

    monkeypatch.setattr(online, "extract", extract)
    return calls


# ---- budget ----------------------------------------------------------------------------------------------------------


def test_imagenet_never_holds_more_than_the_budget(free, extracted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw pixels of 1,281,167 views of 96 pixels are 142 GB, averaged to 32 pixels 15.7 GB. 16 MB are allowed."""
    labels = np.arange(1_281_167) % 100
    names = tuple(f"{label:02}" for label in range(100))
    parts = []
    for count in (len(labels), 50_000):
        pixels = np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (count, 96, 96, 3))
        parts.append(ImageIndex.from_pixels("imagenet", pixels, labels[:count], names))
    source = GreySource(96)
    monkeypatch.setattr(online, "open_source", lambda *_: source)
    monkeypatch.setattr(online, "BATCH", 32)
    free.bytes = 2 * 16 * 2**20
    evaluator, printed = evaluator_of(Dataset(parts[0], parts[1]), source, side=96)
    monkeypatch.setattr(evaluator, "_geometry", lambda _: {})  # of 1,024 pairs, however many images there are
    with LargestTensor() as largest:
        accuracy = evaluator.pixels()
        results = evaluator.evaluate(WideEncoder())  # type: ignore[arg-type]
    assert accuracy == pytest.approx(1, abs=0.5), "all images are equal, and there are 100 classes"
    assert largest.bytes <= 16 * 2**20
    pixel_bank, pixel_queries, bank, queries = (count for count, _ in extracted)
    assert 4 * 3072 * (pixel_bank + pixel_queries) <= 16 * 2**20 < 4 * 4 * 3072 * (pixel_bank + pixel_queries)
    assert 4 * 2048 * (bank + queries) <= 16 * 2**20
    assert results["knn_bank_images"] == bank < 1_281_167
    averaged, pixels, features = printed()
    assert averaged == "kNN of raw pixels: the views of 96 pixels are averaged to 32"
    assert pixels.startswith(
        f"kNN of raw pixels: {pixel_bank:,} of 1,281,167 images in the bank, {pixel_queries:,} que"
    )
    assert pixels.endswith("15.2 GiB of features of all images exceed the 16.0 MiB for them on cpu")
    assert features.startswith(f"kNN: {bank:,} of 1,281,167 images in the bank, {queries:,} queries, since ")


def test_with_enough_memory_all_images_are_used_and_nothing_is_said(shapes: Dataset, free, extracted) -> None:
    """An exact fit is enough."""
    free.bytes = 2 * 4 * 3 * SIDE**2 * 1200
    evaluator, printed = evaluator_of(shapes)
    assert evaluator.pixels() is not None
    assert "knn_top1_percent" in evaluator.evaluate(Encoder())  # type: ignore[arg-type]
    assert extracted == [(1000, 256), (200, 200)] * 2
    assert printed() == []


def test_views_up_to_64_pixels_are_compared_as_they_are(shapes: Dataset, free, monkeypatch) -> None:
    dims = []
    for side in (64, 65):
        evaluator, _ = evaluator_of(shapes, side=side)
        monkeypatch.setattr(evaluator, "_knn", lambda name, function, widths: dims.extend(widths))
        evaluator.pixels()
    assert dims == [3 * 64 * 64, 3 * 32 * 32]


def test_later_evaluations_use_the_same_images_or_fewer(shapes: Dataset, free, extracted) -> None:
    evaluator, printed = evaluator_of(shapes)
    needed = 2 * 4 * 12 * 1200
    used = []
    for free.bytes in (needed, needed - 1, needed, needed // 4, needed // 4):
        used.append(evaluator.evaluate(Encoder()).get("knn_bank_images", 1000))  # type: ignore[arg-type]
    assert used == [1000, 500, 500, 120, 120], "an eighth of each class of 100, rounded down, is 12"
    assert len(printed()) == 2, "once for each change"


def test_too_little_memory_for_k_neighbours_leaves_it_out(shapes: Dataset, free, extracted) -> None:
    free.bytes = 100
    evaluator, printed = evaluator_of(shapes)
    assert evaluator.pixels() is None
    assert set(evaluator.evaluate(Encoder())) == {"alignment", "uniformity", "effective_rank"}  # type: ignore[arg-type]
    assert extracted == []
    reason = "of features of all images exceed the 0.0 MiB for them on cpu"
    assert printed() == [f"kNN of raw pixels is left out: 3.5 MiB {reason}", f"kNN is left out: 0.1 MiB {reason}"]


# ---- running out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [NO_MEMORY, MemoryError("Unable to allocate 718 GiB")], ids=["device", "host"])
@pytest.mark.parametrize("failures", [1, 3])
def test_an_evaluation_out_of_memory_is_retried_smaller(shapes, free, extracted, error, failures: int) -> None:
    evaluator, printed = evaluator_of(shapes)
    encoder, left = Encoder(), [error] * failures

    def features(images: Tensor) -> Tensor:
        if left:
            raise left.pop()
        return Encoder.features(encoder, images)

    encoder.features = features
    results = evaluator.evaluate(encoder)  # type: ignore[arg-type]
    assert 0 <= results["knn_top1_percent"] <= 100
    assert encoder.training
    assert [batch for _, batch in extracted][: failures + 1] == [256, 128, 64, 32][: failures + 1]
    banks = [count for count, _ in extracted][: failures + 1]
    assert banks == sorted(set(banks), reverse=True), "each time fewer"
    assert results["knn_bank_images"] == banks[-1]
    lines = printed()
    assert len(lines) == failures
    assert all("since it has run out of memory on CPU" in line for line in lines)
    evaluator.evaluate(encoder)  # type: ignore[arg-type]
    assert extracted[-2] == (banks[-1], [256, 128, 64, 32][failures]), "what worked is kept"
    assert printed() == []


def test_an_evaluation_that_always_runs_out_is_left_out(shapes: Dataset, free, extracted) -> None:
    evaluator, printed = evaluator_of(shapes)
    encoder = Encoder()
    encoder.features = lambda images: (_ for _ in ()).throw(NO_MEMORY)  # type: ignore[assignment]
    assert evaluator.evaluate(encoder) == {}  # type: ignore[arg-type]
    assert encoder.training
    assert len(extracted) == 1 + online.RETRIES
    knn, others = printed()[-2:]
    assert knn.startswith("kNN is left out: it has run out of memory on CPU")
    assert others.startswith("alignment, uniformity and effective rank are left out: it has run out of memory on CPU")


def test_other_errors_are_not_hidden(shapes: Dataset, free) -> None:
    evaluator, _ = evaluator_of(shapes)
    encoder = Encoder()
    encoder.features = lambda images: torch.empty(0).sum(3)  # type: ignore[assignment]
    with pytest.raises(IndexError):
        evaluator.evaluate(encoder)  # type: ignore[arg-type]


def test_without_labels_it_is_left_out(free) -> None:
    evaluator, printed = evaluator_of(Dataset(ImageIndex.from_pixels("a", make_shapes(64, size=SIDE)[0])))
    encoder = Encoder()
    encoder.features = lambda images: (_ for _ in ()).throw(NO_MEMORY)  # type: ignore[assignment]
    assert evaluator.evaluate(encoder) == {}  # type: ignore[arg-type]
    assert printed()[0].startswith("alignment, uniformity and effective rank are left out: it has run out of memory")


def test_training_goes_on_without_the_evaluation(tmp_path: Path, monkeypatch, capsys) -> None:
    def out_of_memory(*_: Any) -> Tensor:
        raise NO_MEMORY

    monkeypatch.setattr(online, "extract", out_of_memory)
    flags = ["--limit", "32", "--batch-size", "8", "--bn-splits", "2", "--moco-k", "16", "--width", "0.125"]
    flags += ["--arch", "resnet18", "--crop-size", "8", "--amp", "fp32", "--device", "cpu", "--pipeline", "resident"]
    flags += ["--epochs", "1", "--knn-every", "1", "--knn-k", "5", "--workers", "1", "--no-tensorboard"]
    assert main(["train", *flags, "--out", str(tmp_path)]) == ExitCode.DONE
    output = capsys.readouterr().out
    assert "kNN is left out: it has run out of memory on CPU" in output
    assert "kNN of raw pixels is left out" in output
    assert "--batch-size" not in output
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in record for record in records)
    assert not any("knn_top1_percent" in record for record in records)


# ---- several ranks ---------------------------------------------------------------------------------------------------


class TwoRanks(World):
    """Rank 0 of two; rank 1 sends `others`, one tensor for each collective."""

    def __init__(self, *others: Tensor) -> None:
        super().__init__(CPU, rank_info=RankInfo(0, 2, 0, 2))
        self.sent: list[Tensor] = []
        self._others = list(others)

    def all_gather(self, tensor: Tensor) -> Any:
        self.sent.append(tensor)
        both = torch.cat([tensor, self._others.pop(0)])
        return SimpleNamespace(wait=lambda: both)


@pytest.mark.parametrize("here", [True, False], ids=["this-rank", "the-other-rank"])
def test_all_ranks_know_that_one_ran_out_while_extracting(here: bool) -> None:
    def extract(side: int, positions: np.ndarray, batch: int) -> Tensor:
        if here:
            raise NO_MEMORY
        return torch.ones(len(positions), 4)

    world = TwoRanks(torch.tensor([4 if here else -1]))
    with pytest.raises(SharedOutOfMemoryError, match="rank 0" if here else "rank 1"):
        knn_distributed._extract_shard(extract, 0, np.arange(8), world, 2)
    assert world.sent[0].tolist() == [-1 if here else 4]


@pytest.mark.parametrize("error", [NO_MEMORY, SharedOutOfMemoryError("rank 1 ran out of memory")], ids=["alone", "all"])
def test_a_rank_that_runs_out_alone_ends_the_run_by_name(shapes: Dataset, free, monkeypatch, error) -> None:
    """The others wait for it in a collective; a retry would be answered by the wrong one."""
    evaluator, printed = evaluator_of(shapes)
    evaluator._world = TwoRanks(*[torch.tensor([2**40])] * 2)
    left = [error]

    def accuracy(*_: Any, **__: Any) -> list[float]:
        if left:
            raise left.pop()
        return [12.5]

    monkeypatch.setattr(online, "distributed_knn_accuracy", accuracy)
    if error is NO_MEMORY:
        with pytest.raises(DeviceError, match="kNN has run out of memory on CPU"):
            evaluator.evaluate(Encoder())  # type: ignore[arg-type]
        return
    monkeypatch.setattr(evaluator, "_geometry", lambda _: {})
    assert evaluator.evaluate(Encoder())["knn_top1_percent"] == 12.5  # type: ignore[arg-type]
    assert len(printed()) == 1
