"""Twenty steps on several ranks are twenty steps on one, and on the paper's algorithm, whatever batch norm looks at."""

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
SIDE = 16  # of 8 pixels the last layers leave one, and among 2 of them batch norm multiplies any difference by hundreds
IMAGES = 3 * BATCH


@dataclass(frozen=True)
class Case:
    """What is trained. With `bn_splits` 1, batch norm sees the whole batch, on however many ranks it lies."""

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
    """Whole batches: pairs of images that have something in common."""
    generator = torch.Generator().manual_seed(2)

    def normal() -> Tensor:
        images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
        return images.contiguous(memory_format=torch.channels_last)

    made = []
    for _ in range(count):
        base, order = normal(), torch.randperm(BATCH, generator=generator)
        order = order if case.shuffle else torch.arange(BATCH)
        index = torch.randperm(IMAGES, generator=generator)[:BATCH]
        made.append(Views(base + 0.5 * normal(), (base + 0.5 * normal())[order], order, index))
    return made


def share(views: Views, world: World) -> Views:
    return Views(world.share(views.query), world.share(views.key), views.key_order, world.share(views.index))


def state_of(step: TrainStep) -> dict[str, Tensor]:
    """Parameters, statistics and dictionary."""
    named = dict(step.model.state_dict()) | {f"dictionary.{n}": t for n, t in step.dictionary.state_dict().items()}
    named |= {f"momentum.{n}": t for n, t in step.state_dict()["momentum_buffer"].items()}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def digest(state: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in state.values())).hexdigest()


def train(case: Case, world: World | None, count: int = STEPS, **options) -> tuple[list[float], TrainStep]:
    """The losses, and the step after them."""
    step, losses = make_step(case, world, **options), []
    for views in batches(case, count):
        step(views if world is None else share(views, world), LR, EMA)
        losses.append(step.read_metrics()["loss"])
    return losses, step


def numpy(state: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors would travel as descriptors of a process that has ended."""
    return {name: tensor.numpy() for name, tensor in state.items()}


def one_rank(ranks: int) -> dict[str, Any]:
    """Every check that needs several processes, in one start of them."""
    with World.join("cpu", timeout_s=60) as world:
        said: dict[str, Any] = {}
        for case in CASES[ranks]:
            losses, step = train(case, world)
            state = state_of(step)
            said[str(case)] = losses, digest(state), numpy(state) if world.is_main else None
        if ranks == 2:
            losses, step = train(Case(2), world, 5, half_gradients=True)
            said["half"] = losses, digest(state_of(step))
            said["bad"] = a_bad_share(world)
            said["buckets"] = buckets_of(world)
        return said


def a_bad_share(world: World) -> dict[str, Any]:
    """One rank's images are not finite: no rank may change anything, and all must count it."""
    case = Case(2)
    step, (first, second) = make_step(case, world), batches(case, 2)
    step(share(first, world), LR, EMA)
    before = digest(state_of(step))
    poisoned = share(second, world)
    if world.rank == 1:
        poisoned.query[0, 0, 0, 0] = math.nan
    step(poisoned, LR, EMA)
    return {"same": digest(state_of(step)) == before, **step.read_metrics()}


def buckets_of(world: World) -> dict[str, Any]:
    """Sums in tiny buckets, with and without overlap, of gradients that are known."""
    found = {}
    for overlap in (True, False):
        for decay in (True, False):
            torch.manual_seed(0)
            encoder = build_encoder("resnet18", width=0.125, stem="cifar", dim=DIM)
            flat = FlatParameters(encoder, decay_norm_and_bias=decay)
            assert flat.grads is not None
            total = GradientReducer(encoder, flat, world, overlap=overlap, bucket_bytes=2**14)
            for _ in range(2):  # the second time, everything has to be as new
                flat.grads.zero_()
                sum((p * (world.rank + 1)).sum() for p in encoder.parameters()).backward()  # pyright: ignore
                total.finish()
            values = {float(v) for p in encoder.parameters() if p.grad is not None for v in p.grad.unique()}
            found[f"{overlap} {decay}"] = (values, len(total._buckets), total.bytes == 4 * len(flat.grads))
    return found


@pytest.fixture(scope="module")
def of_ranks() -> dict[int, list[dict[str, Any]]]:
    return {}


def said_by(ranks: int, known: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if ranks not in known:
        known[ranks] = results(start(ranks, one_rank, ranks, timeout_s=240))
    return known[ranks]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), [(r, c) for r, cases in CASES.items() for c in cases], ids=str)
def test_twenty_steps_are_those_of_one_rank(ranks: int, case: Case, of_ranks) -> None:
    """In float64 to the last digits; and bit for bit the same state on all ranks."""
    said = [mine[str(case)] for mine in said_by(ranks, of_ranks)]
    assert len({of_rank[1] for of_rank in said}) == 1
    losses, _, found = said[0]
    expected_losses, step = train(case, None)
    assert losses == pytest.approx(expected_losses, rel=1e-8)
    expected = state_of(step)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(torch.from_numpy(found[name]).double(), tensor.double()) < 1e-8, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "case"),
    [(2, Case(1, symmetric=True)), (2, Case(4, symmetric=True)), (4, Case(2)), (4, Case(8))],
    ids=str,
)
def test_the_losses_are_the_papers(ranks: int, case: Case, of_ranks) -> None:
    """Shuffled, split and synchronised batch norm against loops over the groups of a whole batch."""
    reference = reference_of(make_step(case), bn_splits=case.bn_splits, symmetric=case.symmetric)
    expected = [
        reference.step(views.query.contiguous(), views.key.contiguous(), views.key_order.tolist())
        for views in batches(case, STEPS)
    ]
    for of_rank in said_by(ranks, of_ranks):
        assert of_rank[str(case)][0] == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_gradients_in_half_the_bytes(of_ranks) -> None:
    """Rounded, but the same on both ranks, and close to what they round."""
    left, right = (mine["half"] for mine in said_by(2, of_ranks))
    assert left == right
    exact, _ = train(Case(2), None, 5)
    assert left[0] != exact
    assert left[0] == pytest.approx(exact, rel=1e-2)


@pytest.mark.slow
def test_a_bad_share_leaves_no_trace_on_any_rank(of_ranks) -> None:
    for mine in said_by(2, of_ranks):
        assert mine["bad"]["same"]
        assert (mine["bad"]["skipped_steps"], mine["bad"]["consecutive_skipped"]) == (1, 1)
        assert math.isfinite(mine["bad"]["loss"])


@pytest.mark.slow
def test_buckets_add_up(of_ranks) -> None:
    for mine in said_by(2, of_ranks):
        for values, buckets, whole in mine["buckets"].values():
            assert values == {3.0}
            assert buckets > 3
            assert whole
