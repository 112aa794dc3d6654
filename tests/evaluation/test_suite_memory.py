"""`fastmoco eval` with little memory: smaller batches, fewer images, or a probe left out, each with a line."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastmoco.backbones.read import LoadedBackbone
from fastmoco.errors import DeviceError
from fastmoco.evaluation import budget, confusion, extractor, suite
from fastmoco.evaluation.cache import FeatureCache
from fastmoco.evaluation.confusion import measure
from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.logistic import fit_bytes
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.splits import EvaluationSplit, Subset, split_dataset
from fastmoco.evaluation.suite import Evaluation
from pipelines.data.index import Dataset, ImageIndex
from pipelines.data.shapes import CLASS_NAMES, make_shapes

CPU = torch.device("cpu")
SIDE = 16
DIM = 12
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.77 GiB")


class Colours(torch.nn.Module):
    """The mean colours of the quarters of a view; runs out of memory with more than `largest` images."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.largest = 10**9

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        if len(images) > self.largest:
            raise NO_MEMORY
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture
def split() -> EvaluationSplit:
    pixels, labels = make_shapes(600, size=SIDE)
    parts = [ImageIndex.from_pixels("shapes", pixels[p], labels[p], CLASS_NAMES) for p in (slice(500), slice(500, 600))]
    return split_dataset(Dataset(parts[0], parts[1]))


@pytest.fixture
def evaluated(split: EvaluationSplit):
    """Run probes; returns results by name, the printed text and the module."""

    def call(probes: str, largest: int = 10**9, **more: Any) -> tuple[dict[str, Any], str, Colours]:
        module, text = Colours(), io.StringIO()
        module.largest = largest
        fields: dict[str, Any] = {"arch": "resnet18", "stem": "cifar", "width": 1.0, "feature_dim": DIM, "side": SIDE}
        fields |= {"mean": (0.5,) * 3, "std": (0.25,) * 3, "origin": "here", "data": None}
        backbone = LoadedBackbone(module=module, **fields)
        options = EvalOptions(run="here", probes=probes, feature_cache=False, pipeline="resident", **more)
        evaluation = Evaluation(split, Extractor(backbone, options, CPU, Console(file=text, width=300)), options)
        return {result.probe: result for result in evaluation.run()}, text.getvalue(), module

    return call


def test_features_are_extracted_in_smaller_batches(evaluated) -> None:
    expected, text, _ = evaluated("knn")
    assert "memory" not in text
    results, text, module = evaluated("knn", largest=64)
    assert module.batches == [256, 128, *[64] * 8, 100, *[50] * 2]
    assert "out of memory: features are extracted in batches of 64\n" in text
    assert results["knn"].accuracy.top1_percent == expected["knn"].accuracy.top1_percent


def test_features_that_never_fit_are_an_error_of_the_device(evaluated) -> None:
    with pytest.raises(DeviceError, match="too little free memory for features of 500 images, even in batches of 16"):
        evaluated("knn", largest=8)


def test_a_probe_that_runs_out_of_memory_is_left_out(evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> Tensor:
        raise NO_MEMORY

    monkeypatch.setattr(suite, "knn_votes", out_of_memory)
    results, text, _ = evaluated("knn,logistic", logistic_c=1.0)
    assert set(results) == {"logistic"}
    assert "the knn probe is left out: it runs out of memory on CPU" in text


def test_logistic_regression_uses_as_many_images_as_the_host_can_hold(evaluated, monkeypatch) -> None:
    whole, _, _ = evaluated("logistic", logistic_c=1.0)
    assert "of 500 images" not in whole["logistic"].description
    monkeypatch.setattr(suite, "budget_bytes", lambda _: 260 * fit_bytes(DIM, len(CLASS_NAMES)))
    part, _, _ = evaluated("logistic", logistic_c=1.0)
    assert part["logistic"].description.endswith(", 250 of 500 images for want of memory")
    assert part["logistic"].settings["images"] == 250
    monkeypatch.setattr(suite, "budget_bytes", lambda _: 8 * fit_bytes(DIM, len(CLASS_NAMES)))
    none, text, _ = evaluated("logistic")
    assert none == {}
    assert "the logistic probe is left out: the host has too little memory for it" in text


def test_few_labels_that_do_not_fit_are_left_out(evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "budget_bytes", lambda _: 60 * fit_bytes(DIM, len(CLASS_NAMES)))
    results, text, _ = evaluated("few-label", labels="10%,50%", label_seeds=1)
    assert results["few-label"].accuracy.amount == "10%"
    assert "the few-label 50% probe is left out" in text


def test_the_linear_probe_on_crops_extracts_no_bank(evaluated) -> None:
    _, text, _ = evaluated("linear", linear_views="padded", linear_epochs=1)
    assert "features of shapes: 100 images" in text
    assert "features of shapes: 500 images" not in text


def test_accuracy_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(103, 7, generator=generator), torch.randint(0, 7, (103,), generator=generator)
    expected = measure(scores, labels)
    monkeypatch.setattr(confusion, "_CHUNK_BYTES", 10 * 7 * 4)
    chunked = measure(scores, labels)
    assert (chunked.top1_percent, chunked.top5_percent) == (expected.top1_percent, expected.top5_percent)
    assert (chunked.confusion == expected.confusion).all()


def test_features_are_checked_in_parts(evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor, "_CHECKED_ROWS", 7)
    assert "knn" in evaluated("knn")[0]


def test_the_cache_is_read_in_parts_and_not_written_without_memory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, features = FeatureCache(tmp_path), torch.arange(30.0).view(10, 3)
    monkeypatch.setattr("fastmoco.evaluation.cache._ROWS", 4)
    assert cache.store("a", features) is None
    loaded = cache.load("a", 10, 3, CPU)
    assert loaded is not None
    assert torch.equal(loaded, features)
    monkeypatch.setattr(budget, "free_bytes", lambda _: 400)
    warning = cache.store("b", features)
    assert warning is not None
    assert "not cached" in warning
    assert not (tmp_path / "b.safetensors").exists()


def test_subsets_of_an_index_share_its_features(evaluated, split: EvaluationSplit) -> None:
    assert isinstance(split.bank, Subset)
    _, text, module = evaluated("knn")
    assert text.count("images/s") == 2
    assert sum(module.batches) == 512 + 100
