"""The largest differences between fastmoco and the loops of `restated.py`, each with the bound that the page promises.

B batch · C embedding · K queue · R ranks · S side of a view
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmoco.evaluation.knn import knn_classify
from fastmoco.evaluation.linear import fit_linear, new_classifier
from fastmoco.evaluation.settings import Sgd
from fastmoco.model.encoder import build_encoder
from fastmoco.model.key_queue import KeyQueue
from fastmoco.model.moco import MoCo
from fastmoco.step.schedules import lr_at
from fastmoco.step.train_step import TrainStep
from pipelines.views import Views
from tests.parity.restated import (
    CifarDemo,
    DistributedBuilder,
    LightlyLoop,
    StridedBatchNorm,
    demo_rate,
    linear_protocol,
    weighted_knn,
)
from tests.parity.views import against_tensors, brighter_than_pil, solarised_levels, standard_view
from tests.reference import narrow_resnet

BATCH, SIDE, DIM, QUEUE, STEPS, GROUPS = 64, 8, 16, 256, 6, 8
RATES = {"lr": 0.03, "sgd_momentum": 0.9, "weight_decay": 5e-4, "temperature": 0.1, "ema_momentum": 0.99}
NATURAL = torch.arange(BATCH)


class Figure(NamedTuple):
    """A comparison: what is compared, in which quantities, how to measure it, and the bound."""

    what: str
    quantities: str
    measure: Callable[[], float]
    bound: float
    unit: str = "relative"


def ours(groups: int, *, symmetric: bool = False, head: tuple[int, ...] = ()) -> TrainStep:
    """Our step in float64."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", width=0.125, stem="cifar", head=head, dim=DIM, bn_splits=groups)
    queue = KeyQueue(QUEUE, DIM, torch.Generator().manual_seed(1)).to(torch.float64)
    names = ("temperature", "sgd_momentum", "weight_decay")
    hyper: dict[str, Any] = {name: RATES[name] for name in names}
    return TrainStep(MoCo(encoder).to(torch.float64), queue, symmetric=symmetric, **hyper)


def theirs(step: TrainStep, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> tuple[nn.Module, nn.Module]:
    """torchvision's network with the weights of `step`, as query and as key encoder."""
    backbone = narrow_resnet("resnet18", 0.125, norm).double()
    backbone.load_state_dict(step.model.query.backbone.state_dict())
    query = nn.Sequential(backbone, copy.deepcopy(step.model.query.head))
    return query, copy.deepcopy(query)


def batches(seed: int = 2) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two views (B, 3, S, S) of each image, in the order of the batch, and the order that keys are shuffled to."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        base = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
        noise = torch.randn(2, *base.shape, generator=generator, dtype=torch.float64)
        found.append((base + noise[0] / 2, base + noise[1] / 2, torch.randperm(BATCH, generator=generator)))
    return found


def our_step(step: TrainStep, im_q: Tensor, im_k: Tensor, order: Tensor) -> float:
    channels_last = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
    views = Views(query=channels_last(im_q), key=channels_last(im_k[order]), key_order=order, index=NATURAL)
    step(views, RATES["lr"], RATES["ema_momentum"])
    return step.read_metrics()["loss"]


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def of_states(step: TrainStep, query: nn.Module, queue: Tensor, *, statistics: bool = True) -> float:
    """The largest relative difference of a tensor of the query encoder, or of the queue."""
    pairs = zip(step.model.query.state_dict().items(), query.state_dict().values(), strict=True)
    skipped = ("num_batches_tracked",) if statistics else ("num_batches_tracked", "running_mean", "running_var")
    found = [difference(value, expected) for (name, value), expected in pairs if not name.endswith(skipped)]
    return max(*found, difference(step.dictionary.keys, queue))


def cifar_demo(*, symmetric: bool) -> float:
    """Its groups are strided: with the batch in an order that makes them runs of images, they are ours."""
    step = ours(GROUPS, symmetric=symmetric)
    demo = CifarDemo(*theirs(step, StridedBatchNorm), step.dictionary.keys, RATES, symmetric=symmetric)
    runs = torch.cat([NATURAL[group::GROUPS] for group in range(GROUPS)])  # row of their batch for each row of ours
    back, losses = runs.argsort(), []
    for im_1, im_2, order in batches():
        found = our_step(step, im_1, im_2, order)
        # `order` is ours: row r of the shuffled keys. Theirs is the same grouping in strided rows.
        directions = [(im_1[back], im_2[back], runs[order][back])]
        if symmetric:  # the other direction, whose queries are grouped as the keys were
            directions.append((im_2[order][back], im_1[order][back], runs[order.argsort()][back]))
        losses.append(abs(found - demo.step(directions)) / found)
    return max(*losses, of_states(step, demo.query, restored(demo.queue.keys, step.dictionary.keys)))


def restored(queue: Tensor, like: Tensor) -> Tensor:
    """The queue with the rows of each batch in our order: those of theirs are the same keys in the order of theirs."""
    return queue[torch.cdist(like, queue).argmin(1)]


def distributed_builder() -> float:
    """One process with batch norm in R groups, against R replicas. Statistics are those of all replicas, averaged."""
    step = ours(GROUPS, head=(64,))
    builder = DistributedBuilder(*theirs(step), step.dictionary.keys, RATES, GROUPS)
    losses = []
    for im_q, im_k, order in batches():
        found = our_step(step, im_q, im_k, order)
        losses.append(abs(found - builder.step(im_q, im_k, order)) / found)
    query = builder.queries[0]
    buffers = [[b for n, b in replica.named_buffers() if "running" in n] for replica in builder.queries]
    averaged = [torch.stack(values).mean(0) for values in zip(*buffers, strict=True)]
    for (_, buffer), value in zip([b for b in query.named_buffers() if "running" in b[0]], averaged, strict=True):
        buffer.copy_(value)
    return max(*losses, of_states(step, query, builder.queue.keys))


def lightly_loop() -> float:
    step = ours(1, head=(64,))
    loop = LightlyLoop(*theirs(step), step.dictionary.keys, RATES)
    losses = []
    for im_q, im_k, order in batches():
        found = our_step(step, im_q, im_k, order)
        losses.append(abs(found - loop.step(im_q, im_k, order)) / found)
    return max(*losses, of_states(step, loop.query, loop.loss.memory_bank.bank))


def knn_predictions() -> float:
    """Predictions that differ, of 500 queries in a bank of 2,000 features of ten classes."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(10, (2_000,), generator=generator)
    centres = torch.randn(10, 32, generator=generator, dtype=torch.float64)
    bank = centres[labels] + 2 * torch.randn(2_000, 32, generator=generator, dtype=torch.float64)
    queries = torch.randn(500, 32, generator=generator, dtype=torch.float64)
    unit = partial(nn.functional.normalize, dim=1)
    expected = weighted_knn(unit(queries), unit(bank), labels, 10, k=200, temperature=0.1)
    found = knn_classify(bank, labels, queries, k=200, temperature=0.1, num_classes=10)
    assert len(expected.unique()) == 10
    return (found != expected).sum().item()


def linear_weights() -> float:
    """Weights and biases after 20 epochs in float64, from the same initial weights and batches."""
    generator, epochs, wd = torch.Generator().manual_seed(4), 20, 1e-3
    x = torch.randn(64, 12, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (64,), generator=generator)
    orders = [torch.randperm(64, generator=generator).split(16) for _ in range(epochs)]
    data = [[(x[rows], y[rows]) for rows in order] for order in orders]
    start = new_classifier(12, 5, torch.device("cpu"), 0).weight.detach().double()
    weight, bias = linear_protocol(start, data, lr=0.5, wd=wd)
    settings = Sgd(lr=0.5, epochs=epochs, batch_size=16, weight_decay=wd)
    flat = (batch for epoch in data for batch in epoch)
    layer = fit_linear(flat, 4, 12, 5, settings, torch.device("cpu"), dtype=torch.float64)
    return max(difference(layer.weight.detach(), weight), difference(layer.bias.detach(), bias))


def demo_rates() -> float:
    found = [
        lr_at(step, schedule="cosine", base_lr=0.06, epochs=200, steps_per_epoch=97, first_epoch=1)
        for step in range(0, 200 * 97, 97)
    ]
    expected = [demo_rate(epoch, 200, 0.06) for epoch in range(1, 201)]
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


FIGURES = (
    Figure(
        "CIFAR demo: batch norm in 8 groups, shuffled keys",
        "loss, weights, statistics and queue",
        partial(cifar_demo, symmetric=False),
        1e-11,
    ),
    Figure(
        "CIFAR demo with the symmetric loss",
        "loss, weights, statistics and queue",
        partial(cifar_demo, symmetric=True),
        1e-11,
    ),
    Figure(
        "ImageNet builder on 8 ranks, shuffled batch norm",
        "loss, weights, statistics averaged over ranks, and queue",
        distributed_builder,
        1e-11,
    ),
    Figure(
        "lightly's loop, with lightly's loss, memory bank and momentum update",
        "loss, weights, statistics and memory bank",
        lightly_loop,
        1e-11,
    ),
    Figure("the demo's weighted kNN, k 200, T 0.1", "predictions of 500 queries", knn_predictions, 0, "predictions"),
    Figure("linear protocol of the ImageNet code", "weights and biases after 20 epochs", linear_weights, 1e-12),
    Figure(
        "views by torchvision's operations on float tensors", "values from 0 to 1", against_tensors, 1e-5, "absolute"
    ),
    Figure(
        "views by torchvision's operations on PIL images", "mean brightness", brighter_than_pil, 1.5, "levels of 255"
    ),
    Figure("PIL's solarisation at its threshold of 128", "the 256 levels", solarised_levels, 0, "levels"),
    Figure("`Resize(256)` and `CenterCrop(224)` of torchvision", "pixels", standard_view, 1.01, "levels of 255"),
    Figure("learning rate of the CIFAR demo", "rates of 200 epochs", demo_rates, 1e-15, "absolute"),
)
