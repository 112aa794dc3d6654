"""The training loops that MoCo users know, restated in plain PyTorch: what `figures.py` compares fastmoco with.

Written anew from the paper and from what the programs compute; none of their code is here.

B batch · C embedding · K queue · R ranks · S side of a view
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rates = dict[str, float]  # lr, sgd_momentum, weight_decay, temperature, ema_momentum


class StridedBatchNorm(nn.Module):
    """The split batch norm of the CIFAR demo: group g of G holds images g, g + G, g + 2G, … of the batch."""

    groups = 8
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        out, statistics = torch.empty_like(x), []
        for group in range(self.groups):
            mean, variance = torch.zeros_like(self.running_mean), torch.ones_like(self.running_var)
            part = x[group :: self.groups]
            out[group :: self.groups] = F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0)
            statistics.append(torch.stack([mean, variance]))
        mean, variance = torch.stack(statistics).mean(0)
        self.running_mean.lerp_(mean, 0.1)
        self.running_var.lerp_(variance, 0.1)
        return out


class Queue:
    """K keys, and the place of the next one."""

    def __init__(self, keys: Tensor) -> None:
        self.keys, self.place = keys.clone(), 0

    def add(self, keys: Tensor) -> None:
        for key in keys:
            self.keys[self.place] = key
            self.place = (self.place + 1) % len(self.keys)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of K + 1 logits, the positive first."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.int64))


def follow(key: nn.Module, query: nn.Module, momentum: float) -> None:
    for moving, parameter in zip(key.parameters(), query.parameters(), strict=True):
        moving.data = momentum * moving.data + (1 - momentum) * parameter.data


def sgd(parameters: Iterable[nn.Parameter], rates: Rates) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameters, lr=rates["lr"], momentum=rates["sgd_momentum"], weight_decay=rates["weight_decay"]
    )


class CifarDemo:
    """A step of the CIFAR notebook: one GPU, split batch norm, keys in a shuffled order, optionally symmetric."""

    def __init__(self, query: nn.Module, key: nn.Module, queue: Tensor, rates: Rates, *, symmetric: bool) -> None:
        self.query, self.key, self.queue, self.rates, self.symmetric = query, key, Queue(queue), rates, symmetric
        self.sgd = sgd(query.parameters(), rates)

    def contrast(self, im_q: Tensor, im_k: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and keys of one direction; keys pass their encoder in this order."""
        q = F.normalize(self.query(im_q), dim=1)
        with torch.no_grad():
            k = F.normalize(self.key(im_k[order]), dim=1)[order.argsort()]
        return info_nce(q, k, self.queue.keys, self.rates["temperature"]), k

    def step(self, directions: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
        """directions  (query images, key images, order of the keys) of one direction, or of both if symmetric."""
        assert len(directions) == 1 + self.symmetric
        follow(self.key, self.query, self.rates["ema_momentum"])
        losses, keys = zip(*(self.contrast(*direction) for direction in directions), strict=True)
        self.sgd.zero_grad()
        torch.stack(losses).sum().backward()
        self.sgd.step()
        for batch in reversed(keys):  # the keys of the second direction are those of the first view
            self.queue.add(batch)
        return float(sum(loss.item() for loss in losses))


class DistributedBuilder:
    """The builder of the ImageNet code on R ranks: a replica each, with plain batch norm over its own shard.

    Keys are gathered, shuffled over all ranks, embedded in shards, gathered and put back in order; gradients are
    averaged as by DistributedDataParallel. Every replica keeps the batch norm statistics of its own shards.
    """

    def __init__(self, query: nn.Module, key: nn.Module, queue: Tensor, rates: Rates, ranks: int) -> None:
        self.queries = [copy.deepcopy(query) for _ in range(ranks)]
        self.keys = [copy.deepcopy(key) for _ in range(ranks)]
        self.queue, self.rates = Queue(queue), rates
        self.sgds = [sgd(replica.parameters(), rates) for replica in self.queries]

    def step(self, im_q: Tensor, im_k: Tensor, order: Tensor) -> float:
        ranks = len(self.queries)
        for key, query in zip(self.keys, self.queries, strict=True):
            follow(key, query, self.rates["ema_momentum"])
        with torch.no_grad():
            shuffled = [F.normalize(key(x), dim=1) for key, x in zip(self.keys, im_k[order].chunk(ranks), strict=True)]
            k = torch.cat(shuffled)[order.argsort()]
        losses = []
        for query, optimiser, x, own in zip(self.queries, self.sgds, im_q.chunk(ranks), k.chunk(ranks), strict=True):
            optimiser.zero_grad()
            losses.append(info_nce(F.normalize(query(x), dim=1), own, self.queue.keys, self.rates["temperature"]))
            losses[-1].backward()
        for replicas in zip(*(query.parameters() for query in self.queries), strict=True):
            mean = torch.stack([parameter.grad for parameter in replicas]).mean(0)
            for parameter in replicas:
                parameter.grad = mean.clone()
        for optimiser in self.sgds:
            optimiser.step()
        self.queue.add(k)
        return torch.stack(losses).mean().item()


class LightlyLoop:
    """The loop of lightly's MoCo example, with lightly's own loss, memory bank and momentum update."""

    def __init__(self, query: nn.Module, key: nn.Module, queue: Tensor, rates: Rates) -> None:
        from lightly.loss import NTXentLoss

        self.query, self.key, self.rates = query, key, rates
        self.loss = NTXentLoss(temperature=rates["temperature"], memory_bank_size=tuple(queue.shape)).to(queue.dtype)
        self.loss.memory_bank.bank.copy_(queue)
        self.sgd = sgd(query.parameters(), rates)

    def step(self, im_q: Tensor, im_k: Tensor, order: Tensor) -> float:
        from lightly.models.utils import update_momentum

        update_momentum(self.query, self.key, self.rates["ema_momentum"])
        with torch.no_grad():
            k = self.key(im_k[order])[order.argsort()]
        loss = self.loss(self.query(im_q), k)
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.item()


def weighted_knn(queries: Tensor, bank: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """The demo's classifier: features of unit norm, each of the k nearest votes for its class with exp(cosine / T)."""
    predictions = []
    for query in queries:
        cosine = bank @ query
        votes = [0.0] * classes
        for row in cosine.argsort(descending=True)[:k].tolist():
            votes[int(labels[row])] += math.exp(cosine[row].item() / temperature)
        predictions.append(max(range(classes), key=votes.__getitem__))
    return torch.tensor(predictions)


def linear_protocol(
    weight: Tensor, epochs: Sequence[Sequence[tuple[Tensor, Tensor]]], *, lr: float, wd: float
) -> tuple[Tensor, Tensor]:
    """The linear classifier of the ImageNet code: SGD with momentum 0.9 on frozen features, a tenth of the rate after
    60 % and 80 % of the epochs, and weight decay on weight and bias alike; → (weight, bias)."""
    weight, bias = weight.clone(), weight.new_zeros(len(weight))
    speed: list[Any] = [None, None]
    for epoch, batches in enumerate(epochs):
        rate = lr * 0.1 ** sum(epoch >= round(share * len(epochs)) for share in (0.6, 0.8))
        for x, y in batches:
            error = (x @ weight.T + bias).softmax(1)
            error[torch.arange(len(y)), y] -= 1
            error /= len(y)
            for slot, (tensor, gradient) in enumerate(((weight, error.T @ x), (bias, error.sum(0)))):
                gradient = gradient + wd * tensor
                speed[slot] = gradient if speed[slot] is None else 0.9 * speed[slot] + gradient
                tensor -= rate * speed[slot]
    return weight, bias


def demo_rate(epoch: int, epochs: int, lr: float) -> float:
    """Cosine decay as in the CIFAR notebook, whose loop counts epochs from 1 to `epochs`."""
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
