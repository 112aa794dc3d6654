"""Twenty steps on several ranks equal those on one rank and of the paper's algorithm, for all batch norm groups."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.distributed.world import World
from fastmoco.model.dictionaries import BatchKeys, MemoryBank
from fastmoco.model.encoder import build_encoder
from fastmoco.model.key_queue import KeyQueue
from fastmoco.model.moco import MoCo
from fastmoco.step.flat_params import FlatParameters
from fastmoco.step.gradients import GradientReducer
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views
from tests.ranks import results, start
from tests.step.test_step_parity import BATCH, DIM, EMA, HYPER, LR, QUEUE, reference_of

STEPS = 20
SIDE = 16  # 8 pixels leave one in the last layers; batch norm over 2 values amplifies any difference by hundreds
IMAGES = 3 * BATCH


@dataclass(frozen=True)
class Case:
    """Training settings. With `bn_splits` 1, batch norm is over the global batch, on any number of ranks."""

    bn_splits: int
    symmetric: bool = False
    mechanism: str = "queue"
    head: tuple[int, ...] = ()

    @property
    def shuffle(self) -> bool:
        return self.bn_splits != 1

    def __str__(self) -> str:
        return f"{self.mechanism}-{self.bn_splits}-splits" + "-symmetric" * self.symmetric


CASES = {
    2: [
        Case(1),
        Case(2, head=(24,)),
        Case(4, symmetric=True),
        Case(1, symmetric=True),
        Case(2, symmetric=True, mechanism="end-to-end"),
        Case(1, mechanism="memory-bank"),
    ],
    4: [Case(2), Case(8), Case(4, symmetric=True)],
}


def make_step(case: Case, world: World | None = None, precision: torch.dtype = torch.float64, **options) -> TrainStep:
    torch.manual_seed(0)
    encoder = build_encoder(
        "resnet18", width=0.125, stem="cifar", head=case.head, dim=DIM, bn_splits=case.bn_splits
    ).to(precision)
    generator = torch.Generator().manual_seed(1)
    dictionary: KeyQueue | BatchKeys | MemoryBank = KeyQueue(QUEUE, DIM, generator)
    if case.mechanism == "end-to-end":
        dictionary = BatchKeys()
    elif case.mechanism == "memory-bank":
        dictionary = MemoryBank(IMAGES, DIM, generator, negatives=30, momentum=0.5, seed=7, world=world)
    model = MoCo(encoder, tied=dictionary.TIED, world=world)
    return TrainStep(model, dictionary.to(precision), symmetric=case.symmetric, **{**HYPER, **options})


def batches(case: Case, count: int) -> list[Views]:
    """Global batches of pairs of correlated images."""
    generator = torch.Generator().manual_seed(2)

    def normal() -> Tensor:
        images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
        return images.contiguous(memory_format=torch.channels_last)

    views = []
    for _ in range(count):
        base, order = normal(), torch.randperm(BATCH, generator=generator)
        order = order if case.shuffle else torch.arange(BATCH)
        index = torch.randperm(IMAGES, generator=generator)[:BATCH]
        views.append(Views(base + 0.5 * normal(), (base + 0.5 * normal())[order], order, index))
    return views


def share(views: Views, world: World) -> Views:
    return Views(world.share(views.query), world.share(views.key), views.key_order, world.share(views.index))


def state_of(step: TrainStep) -> dict[str, Tensor]:
    """Parameters, running statistics, dictionary and momentum buffers."""
    named = dict(step.model.state_dict()) | {f"dictionary.{n}": t for n, t in step.dictionary.state_dict().items()}
    named |= {f"momentum.{n}": t for n, t in step.state_dict()["momentum_buffer"].items()}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def digest(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in state.values())).hexdigest()


def train(case: Case, world: World | None, count: int = STEPS, **options) -> tuple[list[float], TrainStep]:
    """The losses, and the step object after training."""
    step, losses = make_step(case, world, **options), []
    for views in batches(case, count):
        step(views if world is None else share(views, world), LR, EMA)
        losses.append(step.read_metrics()["loss"])
    return losses, step


def numpy(state: dict[str, Tensor]) -> dict[str, Any]:
    """NumPy copies; tensors would be sent as file descriptors of a process that has exited."""
    return {name: tensor.numpy() for name, tensor in state.items()}


def one_rank(ranks: int) -> dict[str, Any]:
    """All measurements that need several processes, in one launch."""
    with World.join("cpu", timeout_s=60) as world:
        outputs: dict[str, Any] = {}
        for case in CASES[ranks]:
            losses, step = train(case, world)
            state = state_of(step)
            outputs[str(case)] = losses, digest(state), numpy(state) if world.is_main else None
        if ranks == 2:
            losses, step = train(Case(2), world, 5, half_gradients=True)
            outputs["half"] = losses, digest(state_of(step))
            outputs["non-finite"] = non_finite_shard(world)
            outputs["buckets"] = buckets_of(world)
        return outputs


def non_finite_shard(world: World) -> dict[str, Any]:
    """One rank's images are not finite: no rank may change its state, and all must count the step as skipped."""
    case = Case(2)
    step, (first, second) = make_step(case, world), batches(case, 2)
    step(share(first, world), LR, EMA)
    before = digest(state_of(step))
    poisoned = share(second, world)
    if world.rank == 1:
        poisoned.query[0, 0, 0, 0] = math.nan
    step(poisoned, LR, EMA)
    return {"unchanged": digest(state_of(step)) == before, **step.read_metrics()}


def buckets_of(world: World) -> dict[str, Any]:
    """Sums of known gradients in tiny buckets, with and without overlap."""
    sums = {}
    for overlap in (True, False):
        for decay in (True, False):
            torch.manual_seed(0)
            encoder = build_encoder("resnet18", width=0.125, stem="cifar", dim=DIM)
            flat = FlatParameters(encoder, decay_norm_and_bias=decay)
            assert flat.grads is not None
            reducer = GradientReducer(encoder, flat, world, overlap=overlap, bucket_bytes=2**14)
            for _ in range(2):  # it must be reusable
                sum((p * (world.rank + 1)).sum() for p in encoder.parameters()).backward()  # pyright: ignore
                if not reducer.overlaps:
                    flat.collect_gradients()
                reducer.finish()
            values = {float(v) for view in flat.named(flat.grads).values() for v in view.unique()}
            sums[f"{overlap} {decay}"] = (values, len(reducer._buckets), reducer.bytes == 4 * len(flat.grads))
    return sums


@pytest.fixture(scope="module")
def cached() -> dict[int, list[dict[str, Any]]]:
    return {}


def outputs_of(ranks: int, cached: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if ranks not in cached:
        cached[ranks] = results(start(ranks, one_rank, ranks, timeout_s=240))
    return cached[ranks]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), [(r, c) for r, cases in CASES.items() for c in cases], ids=str)
def test_twenty_steps_equal_those_of_one_rank(ranks: int, case: Case, cached) -> None:
    """In float64 up to rounding, with a bit-identical state on all ranks."""
    outputs = [own[str(case)] for own in outputs_of(ranks, cached)]
    assert len({digest for _, digest, _ in outputs}) == 1
    losses, _, state = outputs[0]
    expected_losses, step = train(case, None)
    assert losses == pytest.approx(expected_losses, rel=1e-8)
    expected = state_of(step)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(torch.from_numpy(state[name]).double(), tensor.double()) < 1e-8, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "case"),
    [(2, Case(1, symmetric=True)), (2, Case(4, symmetric=True)), (4, Case(2)), (4, Case(8))],
    ids=str,
)
def test_the_losses_are_those_of_the_papers_algorithm(ranks: int, case: Case, cached) -> None:
    """Shuffled, split and synchronised batch norm against loops over the groups of a global batch."""
    reference = reference_of(make_step(case), bn_splits=case.bn_splits, symmetric=case.symmetric)
    expected = [
        reference.step(views.query.contiguous(), views.key.contiguous(), views.key_order.tolist())
        for views in batches(case, STEPS)
    ]
    for own in outputs_of(ranks, cached):
        assert own[str(case)][0] == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_gradients_in_bfloat16(cached) -> None:
    """Rounded, but the same on both ranks, and close to the exact ones."""
    left, right = (own["half"] for own in outputs_of(2, cached))
    assert left == right
    exact, _ = train(Case(2), None, 5)
    assert left[0] != exact
    assert left[0] == pytest.approx(exact, rel=1e-2)


@pytest.mark.slow
def test_a_non_finite_shard_changes_no_rank(cached) -> None:
    for own in outputs_of(2, cached):
        assert own["non-finite"]["unchanged"]
        assert (own["non-finite"]["skipped_steps"], own["non-finite"]["consecutive_skipped"]) == (1, 1)
        assert math.isfinite(own["non-finite"]["loss"])


@pytest.mark.slow
def test_buckets_add_up(cached) -> None:
    for own in outputs_of(2, cached):
        for values, buckets, is_complete in own["buckets"].values():
            assert values == {3.0}
            assert buckets > 3
            assert is_complete
