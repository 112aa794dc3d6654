"""The queue's two rivals against plain references, and that they keep the step's promises as the queue does."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import LoopBatchNorm, narrow_resnet
from torch import Tensor, nn

from fastmoco.cli import main
from fastmoco.config import RunConfig
from fastmoco.errors import ConfigError, ExitCode, Preempted
from fastmoco.model.dictionaries import BatchKeys, MemoryBank
from fastmoco.model.encoder import build_encoder
from fastmoco.model.moco import MoCo
from fastmoco.run.metrics import read_metrics
from fastmoco.run.resolve import resolve
from fastmoco.step.cuda_graph import GraphedStep
from fastmoco.step.info_nce import in_batch_info_nce
from fastmoco.step.train_step import TrainStep
from pipelines.data.index import ImageIndex
from pipelines.randomness import Domain, philox
from pipelines.views import Views
from tests.run.test_train import RESIDENT, newest, run_until
from tests.step.test_cuda_graph import Recorder
from tests.step.test_step_parity import BATCH, DIM, HYPER, LR, bits, parameters, random_views, relative_error

IMAGES, NEGATIVES, MOMENTUM, SEED = 50, 30, 0.5, 7
RIVALS = ("end-to-end", "memory-bank")


def bank(seed: int = SEED, images: int = IMAGES, negatives: int = NEGATIVES) -> MemoryBank:
    generator = torch.Generator().manual_seed(1)
    return MemoryBank(images, DIM, generator, negatives=negatives, momentum=MOMENTUM, seed=seed)


def make_step(
    mechanism: str,
    *,
    symmetric: bool = False,
    bn_splits: int = 1,
    device: str = "cpu",
    precision: torch.dtype = torch.float32,
    **options,
) -> TrainStep:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", width=0.125, stem="cifar", dim=DIM, bn_splits=bn_splits)
    dictionary = (BatchKeys() if mechanism == "end-to-end" else bank()).to(device, precision)
    model = MoCo(encoder, tied=dictionary.TIED).to(device, precision)
    return TrainStep(model, dictionary, symmetric=symmetric, **{**HYPER, **options})


def batches(
    count: int, *, shuffle: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Views]:
    """Batches of different images each, in no order."""
    generator = torch.Generator().manual_seed(2)
    drawn = [random_views(generator, shuffle=shuffle, dtype=dtype, device=device) for _ in range(count)]
    index = [torch.randperm(IMAGES, generator=generator)[:BATCH].to(device) for _ in drawn]
    return [dataclasses.replace(views, index=images) for views, images in zip(drawn, index, strict=True)]


def live(step: TrainStep) -> dict[str, Tensor]:
    state = {f"model.{n}": t for n, t in step.model.state_dict().items()}
    state |= {f"dictionary.{n}": t for n, t in step.dictionary.state_dict().items()}
    return state | {f"step.{n}": t for named in step.state_dict().values() for n, t in named.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(bits(before[name]), bits(after[name]))]


# ---- the algorithms --------------------------------------------------------------------------------------------------


class Reference:
    """One encoder and SGD, in plain torch; subclasses say what is contrasted."""

    def __init__(self, step: TrainStep, bn_splits: int) -> None:
        backbone = narrow_resnet("resnet18", 0.125, partial(LoopBatchNorm, splits=bn_splits)).to(torch.float64)
        backbone.load_state_dict(step.model.query.backbone.state_dict())
        self.f = nn.Sequential(backbone, copy.deepcopy(step.model.query.head))
        decay, momentum = HYPER["weight_decay"], HYPER["sgd_momentum"]
        self.sgd = torch.optim.SGD(self.f.parameters(), lr=LR, momentum=momentum, weight_decay=decay)

    def embed(self, x: Tensor) -> Tensor:
        return F.normalize(self.f(x.contiguous()), dim=1)

    def descend(self, loss: Tensor) -> float:
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.item()


class EndToEnd(Reference):
    """InfoNCE among the keys of the batch; the one set of weights takes the gradient of both sides."""

    def step(self, views: Views, symmetric: bool) -> float:
        first, second = self.embed(views.query), self.embed(views.key)
        place = [views.key_order.tolist().index(i) for i in range(BATCH)]  # of image i in the key batch
        loss = self.contrast(first, second[place])
        if symmetric:
            loss = loss + self.contrast(second, first[views.key_order])
        return self.descend(loss)

    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        losses = []
        for i in range(BATCH):
            similarity = torch.stack([q[i] @ k[j] for j in range(BATCH)]) / HYPER["temperature"]
            losses.append(torch.logsumexp(similarity, dim=0) - similarity[i])
        return torch.stack(losses).mean()


class Bank(Reference):
    """Wu et al. 2018, with a dictionary drawn for the batch from the images outside it."""

    def __init__(self, step: TrainStep, bn_splits: int) -> None:
        super().__init__(step, bn_splits)
        self.features, self.draws = step.dictionary.features.clone(), 0

    def step(self, views: Views, symmetric: bool) -> float:
        q = self.embed(views.query)
        negatives = self.features[draw_by_hand(views.index.tolist(), self.draws)]
        losses = []
        for i, image in enumerate(views.index.tolist()):
            logits = torch.cat([self.features[image][None], negatives]) @ q[i] / HYPER["temperature"]
            losses.append(-torch.log_softmax(logits, dim=0)[0])
        loss = self.descend(torch.stack(losses).mean())
        for i, image in enumerate(views.index.tolist()):
            mixed = MOMENTUM * self.features[image] + (1 - MOMENTUM) * q[i].detach()
            self.features[image] = mixed / mixed.norm()
        self.draws += 1
        return loss


def draw_by_hand(index: list[int], draw: int, seed: int = SEED, images: int = IMAGES) -> list[int]:
    outside = [image for image in range(images) if image not in index]
    words = philox(seed, Domain.NEGATIVES, slot=np.arange(-(-NEGATIVES // 4)), epoch=draw).reshape(-1)
    return [outside[int(word) * len(outside) >> 32] for word in words[:NEGATIVES]]


@pytest.mark.parametrize(("bn_splits", "shuffle"), [(1, False), (2, True)], ids=["plain-bn", "split-bn"])
@pytest.mark.parametrize(
    ("mechanism", "symmetric", "plain"),
    [("end-to-end", False, EndToEnd), ("end-to-end", True, EndToEnd), ("memory-bank", False, Bank)],
)
def test_five_steps_are_the_reference_s(
    mechanism: str, symmetric: bool, plain: type[Any], bn_splits: int, shuffle: bool
) -> None:
    step = make_step(mechanism, symmetric=symmetric, bn_splits=bn_splits, precision=torch.float64)
    reference = plain(step, bn_splits)
    for views in batches(5, shuffle=shuffle, dtype=torch.float64):
        expected = reference.step(views, symmetric)
        step(views, LR, 0.9)  # of what neither has
        assert step.read_metrics()["loss"] == pytest.approx(expected, rel=1e-11)
    assert relative_error(parameters(step.model.query), parameters(reference.f)) <= 1e-11
    if mechanism == "memory-bank":
        torch.testing.assert_close(step.dictionary.features, reference.features, rtol=0, atol=1e-11)
        assert step.dictionary.draws.item() == 5


def test_in_batch_loss_by_hand() -> None:
    # Two images, orthogonal queries, keys as their queries: similarity 1 and 0, so −log(e / (e + 1)) at τ = 1.
    q = torch.eye(2, requires_grad=True)
    k = torch.eye(2, requires_grad=True)
    loss = in_batch_info_nce(q, k, 1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    loss.backward()
    missed = 1 / (1 + math.e) / 2  # softmax of the wrong key, a half of the mean each
    expected = torch.tensor([[-missed, missed], [missed, -missed]])
    torch.testing.assert_close(q.grad, expected)
    torch.testing.assert_close(k.grad, expected)


# ---- what is drawn from the bank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [0, 1, 2**20])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_draws_are_philox_numbers_of_images_outside_the_batch(draw: int, seed: int) -> None:
    memory, index = bank(seed), torch.randperm(IMAGES)[:BATCH]
    memory.draws.fill_(draw)
    assert memory.draw(index).tolist() == draw_by_hand(index.tolist(), draw, seed)


@pytest.mark.parametrize("index", [[0], [9], [0, 1, 2], [9, 8, 7], [5, 0, 9, 2], [8, 1, 0, 3, 2, 7, 9, 6, 5]])
def test_every_image_outside_the_batch_is_drawn_equally_often(index: list[int]) -> None:
    count = 40_000
    drawn = bank(images=10, negatives=count).draw(torch.tensor(index))
    found = torch.bincount(drawn, minlength=10)
    assert found[index].sum() == 0
    expected = count / (10 - len(index))
    others = [image for image in range(10) if image not in index]
    assert ((found[others] - expected).abs() <= 5 * math.sqrt(expected)).all()


# ---- the promises of the step ----------------------------------------------------------------------------------------


def test_twins_stay_twins_and_both_learn() -> None:
    step = make_step("end-to-end")
    start = parameters(step.model.query)
    for views in batches(3):
        step(views, LR, 0.9)
        assert torch.equal(parameters(step.model.key), parameters(step.model.query))
    assert not torch.equal(parameters(step.model.query), start)
    # Not through the queries alone: without the keys' share the first step ends elsewhere.
    half, views = make_step("end-to-end"), batches(1)[0]
    for parameter in half.model.key.parameters():
        parameter.register_hook(torch.zeros_like)
    whole = make_step("end-to-end")
    for one in (half, whole):
        one(views, LR, 0.9)
    moved = [parameters(one.model.query) - start for one in (half, whole)]
    assert relative_error(moved[0], moved[1]) > 0.1


@pytest.mark.parametrize("mechanism", RIVALS)
def test_a_bad_batch_leaves_no_trace(mechanism: str) -> None:
    step = make_step(mechanism, bn_splits=2)
    good, bad = batches(2)
    step(good, LR, 0.0)
    before = {name: tensor.clone() for name, tensor in live(step).items() if "sum" not in name and "step" not in name}
    bad.query[0, 0, 0, 0] = math.nan
    step(bad, LR, 0.0)
    assert changed(before, live(step)) == []
    assert step.read_metrics()["skipped_steps"] == 1


@pytest.mark.parametrize("mechanism", RIVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_captured_step_is_the_step_bit_for_bit(mechanism: str, dtype: torch.dtype) -> None:
    eager, captured = make_step(mechanism, dtype=dtype), make_step(mechanism, dtype=dtype)
    for step in (eager, captured):
        if step.scaler is not None:
            step.scaler.scale.fill_(64.0)
    views = batches(3)
    graph = GraphedStep(captured, views[0], Recorder())
    for number in range(3):
        eager(views[number], LR, 0.0)
        graph(views[number], LR, 0.0)
    assert changed(live(eager), live(captured)) == []
    metrics = eager.read_metrics()
    assert metrics == captured.read_metrics()
    assert metrics["skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.any_device
@pytest.mark.parametrize("mechanism", RIVALS)
def test_a_step_with_kernels_is_the_step_without(mechanism: str, require_backend: Callable[[str], None]) -> None:
    require_backend("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, plain = (make_step(mechanism, bn_splits=2, kernels=kernels, device=device) for kernels in ("triton", "torch"))
    for step in (ours, plain):
        step(batches(1, device=device)[0], LR, 0.0)
    for target, source in zip(ours.changed_tensors(), plain.changed_tensors(), strict=True):
        if target.is_floating_point() and source.any():
            assert relative_error(target, source) <= 1e-4
        else:
            assert torch.equal(target, source)


@pytest.mark.parametrize("mechanism", RIVALS)
def test_recomputed_activations_change_nothing(mechanism: str) -> None:
    kept, again = make_step(mechanism, bn_splits=2), make_step(mechanism, bn_splits=2, checkpoint_activations=True)
    for views in batches(2):
        for step in (kept, again):
            step(views, LR, 0.0)
    assert changed(live(kept), live(again)) == []


@pytest.mark.parametrize("mechanism", RIVALS)
def test_a_run_stopped_on_the_way_goes_on_bit_for_bit(mechanism: str, tmp_path: Path) -> None:
    size = "8" if mechanism == "end-to-end" else "16"
    flags = ["--mechanism", mechanism, "--moco-k", size, "--log-every", "1", "--knn-every", "0", "--no-moco-m-cos"]
    run_until(tmp_path / "whole", None, flags)
    with pytest.raises(Preempted, match="stopped by SIGTERM at step 4"):
        run_until(tmp_path / "parts", 3, flags)
    run_until(tmp_path / "parts", None, [*flags, "--resume"])
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert changed(whole, parts) == []
    if mechanism == "memory-bank":
        assert whole["bank/features"].shape == (32, 128)
        assert int(whole["bank/draws"]) == 8
    losses = [record["loss"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in record]
    assert losses == [r["loss"] for r in read_metrics(tmp_path / "parts" / "metrics.jsonl") if "loss" in r]
    assert all(map(math.isfinite, losses))


# ---- settings --------------------------------------------------------------------------------------------------------


def resolved(count: int = 1000, **values) -> dict[str, Any]:
    index = ImageIndex("x", np.full((count, 2), 32, dtype=np.int32), paths=("x.png",) * count)
    return resolve(RunConfig().replace(data="./x", **values), index, torch.device("cpu"))[0].flat()


def test_what_each_mechanism_leaves_open_is_filled_in() -> None:
    found = resolved(mechanism="end-to-end")
    assert (found["moco_k"], found["batch_size"], found["moco_m"]) == (64, 64, 0.0)
    found = resolved(mechanism="memory-bank")
    assert (found["moco_k"], found["moco_m"], found["bank_m"]) == (1000, 0.0, 0.5)
    assert resolved(mechanism="queue")["moco_m"] == 0.99


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"mechanism": "end-to-end", "batch_size": 64, "moco_k": 4096},
            r"--moco-k 4096 is larger than the batch of 64.*every key needs its gradient.*--batch-size 4096",
        ),
        (
            {"mechanism": "end-to-end", "batch_size": 64, "moco_k": 32},
            r"--moco-k 32 is smaller than the batch of 64.*the dictionary is the batch",
        ),
        ({"mechanism": "memory-bank", "batch_size": 1000}, r"--batch-size 1000 is all the images.*500 or less"),
        ({"mechanism": "memory-bank", "symmetric": True}, r"--symmetric .* from the bank: use --no-symmetric"),
        ({"mechanism": "end-to-end", "moco_m": 0.99}, r"--moco-m is 0.99, .* no momentum encoder.*--moco-m 0"),
        ({"mechanism": "memory-bank", "moco_m_cos": True}, r"--moco-m-cos is set"),
        ({"mechanism": "memory-bank", "bank_m": 1.0}, r"--bank-m is 1.0, expected .* below 1: Wu et al. use 0.5"),
        ({"mechanism": "bank"}, r"--mechanism is 'bank'.*did you mean memory-bank"),
    ],
)
def test_what_a_mechanism_cannot_do_is_refused_in_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        resolved(**values)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_mechanism_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", *RESIDENT, "--knn-every", "0", "--no-tensorboard", "--out", str(tmp_path / "run")]
    assert main([*flags, "--epochs", "1"]) == ExitCode.DONE
    assert main([*flags, "--resume", "--mechanism", "memory-bank", "--moco-m", "0"]) == ExitCode.CHECKPOINT
    assert "mechanism is 'memory-bank' and was 'queue'" in capsys.readouterr().err
