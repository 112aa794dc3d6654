"""Online evaluation with and without labels; it does not change the encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmoco.config import DataConfig, RunConfig, RunOptions
from fastmoco.config.choices import KnnSpace
from fastmoco.distributed.world import World
from fastmoco.evaluation import online
from fastmoco.evaluation.geometry import alignment, effective_rank, uniformity
from fastmoco.evaluation.knn import knn_accuracy
from fastmoco.evaluation.online import OnlineEvaluator
from fastmoco.model.encoder import Encoder, build_encoder
from fastmoco.run.resolve import resolve
from pipelines.augment.presets import CIFAR
from pipelines.backends.resident import ResidentCrops
from pipelines.backends.two_view import TwoViewPipeline
from pipelines.data.index import Dataset, ImageIndex
from pipelines.data.shapes import CLASS_NAMES, make_shapes
from pipelines.plan.planner import Planner

CPU = torch.device("cpu")
GEOMETRY = ("alignment", "uniformity", "effective_rank")


def shapes(count: int, start: int = 0, *, labelled: bool = True) -> ImageIndex:
    pixels, labels = make_shapes(count, size=16, start=start)
    return ImageIndex.from_pixels("shapes", pixels, labels if labelled else None, CLASS_NAMES if labelled else ())


def evaluator_of(dataset: Dataset, *, dtype: torch.dtype = torch.float32, knn_on: KnnSpace = "both") -> OnlineEvaluator:
    config = RunConfig(data=DataConfig(pipeline="resident", workers=1), run=RunOptions(knn_k=5, knn_on=knn_on))
    config, _ = resolve(config.replace(batch_size=32), dataset.train, CPU)
    source = ResidentCrops(dataset.train, 16, CPU, 1)
    planner = Planner(dataset.train.sizes, seed=0, batch_size=32, augmentation=CIFAR, shuffle_keys=True)
    return OnlineEvaluator(
        config, dataset, source, TwoViewPipeline(planner, source, CPU, dtype), CIFAR, World(CPU), dtype
    )


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "PAIRS", 128)
    monkeypatch.setattr(online, "PAIRS_WITH_LABELS", 128)


@pytest.fixture
def encoder() -> Encoder:
    """An encoder with updated batch norm statistics, so that evaluation differs from training."""
    torch.manual_seed(0)
    built = build_encoder("resnet18", width=0.125, stem="cifar", dim=16, bn_splits=2)
    built.train()
    with torch.no_grad():
        for _ in range(3):
            built(torch.randn(16, 3, 16, 16))
    return built


def features(encoder: Encoder, index: ImageIndex, positions: np.ndarray, *, output: bool = False) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CIFAR.mean, CIFAR.std))
    pixels = torch.from_numpy(index.pixels[positions]).permute(0, 3, 1, 2)  # pyright: ignore[reportOptionalSubscript]
    encoder.eval()
    with torch.no_grad():
        extracted = (encoder if output else encoder.features)((pixels / 255 - mean) / std)
    encoder.train()
    return extracted


def labels(index: ImageIndex, positions: np.ndarray) -> torch.Tensor:
    assert index.labels is not None
    return torch.from_numpy(index.labels[positions])


def test_with_a_test_split_the_training_images_are_the_bank(encoder: Encoder) -> None:
    dataset = Dataset(shapes(120), shapes(40, 120))
    evaluator = evaluator_of(dataset)
    bank, test = np.arange(120), np.arange(40)
    assert dataset.test is not None
    subsets = (dataset.train, bank), (dataset.test, test)
    expected = {}
    for name, output in (("knn_top1_percent", False), ("knn_output_top1_percent", True)):
        sides = [(features(encoder, *s, output=output), labels(*s)) for s in subsets]
        accuracy = knn_accuracy(*sides[0], *sides[1], k=5, temperature=0.1, num_classes=10)
        expected[name] = pytest.approx(accuracy, abs=2.6)  # up to one image
    assert evaluator.has_labels
    metrics = evaluator.evaluate(encoder)
    assert {name: metrics[name] for name in expected} == expected
    assert set(metrics) == {*expected, *GEOMETRY}
    spaces: tuple[KnnSpace, ...] = ("features", "output")
    for knn_on, name in zip(spaces, expected, strict=True):
        metrics = evaluator_of(dataset, knn_on=knn_on).evaluate(encoder)
        assert {key: value for key, value in metrics.items() if key.startswith("knn")} == {name: expected[name]}
    pixels = evaluator.pixels()
    assert pixels is not None
    assert 10 < pixels < 100


def test_without_a_test_split_a_tenth_is_held_out_of_the_bank(encoder: Encoder) -> None:
    """Queries cover many classes even if image i is of class i mod 10, as in shapes."""
    evaluator = evaluator_of(Dataset(shapes(200)))
    assert evaluator._subsets is not None
    bank_positions, queries = (s.positions for s in evaluator._subsets)
    assert len(queries) == 20
    np.testing.assert_array_equal(np.sort(np.concatenate([queries, bank_positions])), np.arange(200))
    assert len(set((queries % 10).tolist())) >= 6
    assert 0 <= evaluator.evaluate(encoder)["knn_top1_percent"] < 100


def test_a_bank_separate_from_the_training_images(encoder: Encoder) -> None:
    """STL-10: pretraining on unlabelled images, evaluation with a separate labelled split."""
    dataset = Dataset(shapes(64, labelled=False), shapes(40, 500), bank=shapes(100, 200))
    evaluator = evaluator_of(dataset)
    assert evaluator.has_labels
    assert set(evaluator.evaluate(encoder)) == {"knn_top1_percent", "knn_output_top1_percent", *GEOMETRY}


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
def test_it_measures_alignment_uniformity_and_rank(encoder: Encoder, labelled: bool) -> None:
    dataset = Dataset(shapes(64, labelled=labelled))
    evaluator = evaluator_of(dataset)
    assert evaluator.has_labels == labelled
    assert (evaluator.pixels() is not None) == labelled
    metrics = evaluator.evaluate(encoder)
    for name in ("knn_top1_percent", "knn_output_top1_percent"):
        assert (metrics.pop(name, None) is not None) == labelled

    source = ResidentCrops(dataset.train, 16, CPU, 1)
    planner = Planner(dataset.train.sizes, seed=0, batch_size=32, augmentation=CIFAR, shuffle_keys=True)
    encoder.eval()
    queries, keys = [], []
    with torch.no_grad():
        for views in TwoViewPipeline(planner, source, CPU, torch.float32).views(0, 4):
            queries.append(encoder(views.query))
            aligned = torch.empty_like(queries[-1])
            aligned[views.key_order] = encoder(views.key)
            keys.append(aligned)
    q, k = torch.cat(queries), torch.cat(keys)
    assert len(q) == 128
    expected = {
        "alignment": alignment(q, k),
        "uniformity": uniformity(q),
        "effective_rank": effective_rank(q - q.mean(0)),
    }
    assert metrics == pytest.approx(expected, rel=1e-4)
    shuffled = F.normalize(k.roll(1, 0), dim=1)
    assert alignment(q, k) < alignment(q, shuffled), "views of one image are closer than views of two"


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation_does_not_change_the_encoder(encoder: Encoder, labelled: bool, dtype: torch.dtype) -> None:
    evaluator = evaluator_of(Dataset(shapes(64, labelled=labelled)), dtype=dtype)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    first, rng = evaluator.evaluate(encoder), torch.random.get_rng_state()
    assert encoder.training
    assert all(module.training for module in encoder.modules())
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())
    assert evaluator.evaluate(encoder) == first, "always on the same images"
    assert torch.equal(rng, torch.random.get_rng_state())


def test_training_mode_is_restored_if_evaluation_fails(encoder: Encoder, monkeypatch) -> None:
    evaluator = evaluator_of(Dataset(shapes(64)))
    monkeypatch.setattr(encoder, "features", lambda _: torch.empty(0).sum(3))
    with pytest.raises(IndexError):
        evaluator.evaluate(encoder)
    assert encoder.training
