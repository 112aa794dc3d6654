"""The training step most people run today, as in the authors' code, with three options that bring it closer to ours.

N batch · C channels · H, W sides · s splits · K queue
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastmoco.model.encoder import build_encoder
from fastmoco.step.flat_params import FlatParameters
from fastmoco.step.sgd_ema import MomentumUpdate
from pipelines.views import Views


@dataclass(frozen=True, kw_only=True)
class Task:
    """The model, batch and optimiser settings of a training step, for any implementation."""

    arch: str
    stem: str
    side: int
    batch_size: int
    queue: int
    bn_splits: int
    dim: int = 128
    temperature: float = 0.1
    lr: float = 0.03
    sgd_momentum: float = 0.9
    weight_decay: float = 5e-4
    ema_momentum: float = 0.99


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """Split batch norm for NCHW: the groups become channels. Sample n is in group n mod s.

        y = batch_norm(x viewed as (N/s, s·C, H, W)) viewed as (N, C, H, W)

    The views need contiguous x, so channels-last requires another implementation.
    """

    def __init__(self, num_features: int, num_splits: int) -> None:
        super().__init__(num_features)
        self.num_splits = num_splits

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        s = self.num_splits
        shape = input.shape
        means, variances = self.running_mean.repeat(s), self.running_var.repeat(s)
        folded = input.view(-1, s * shape[1], *shape[2:])
        weight, bias = self.weight.repeat(s), self.bias.repeat(s)
        out = F.batch_norm(folded, means, variances, weight, bias, True, self.momentum, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(means.view(s, -1).mean(dim=0))
            self.running_var.copy_(variances.view(s, -1).mean(dim=0))
        return out.view(shape)


def plain_encoder(task: Task) -> nn.Module:
    """torchvision's ResNet with its classifier as the projection; the CIFAR stem is 3×3, stride 1, without pooling."""
    norm = partial(FoldedBatchNorm2d, num_splits=task.bn_splits) if task.bn_splits > 1 else nn.BatchNorm2d
    encoder = torchvision.models.get_model(task.arch, num_classes=task.dim, norm_layer=norm)
    if task.stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder


class PlainStep:
    """`step(views)` → the loss, read by the host: eager, stored logits, keys shuffled by indexing.

    channels_last  our encoder with its own split batch norm, in channels-last layout, instead of the NCHW one
    dtype          autocast to a 16-bit dtype (bfloat16: no loss scaling)
    one_pass       `MomentumUpdate` over flat buffers, instead of torch.optim.SGD and an EMA per parameter
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        *,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        one_pass: bool = False,
    ) -> None:
        self.task, self.device, self.dtype = task, device, dtype
        if channels_last:
            encoder = build_encoder(task.arch, stem=task.stem, dim=task.dim, bn_splits=task.bn_splits)
        else:
            encoder = plain_encoder(task)
        self.query = encoder.to(device).train()
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.queue = F.normalize(torch.randn(task.dim, task.queue, device=device), dim=0)
        self.pointer = torch.zeros(1, dtype=torch.int64)
        self._last_loss = 0.0
        self.update: MomentumUpdate | None = None
        if one_pass:
            query, key = FlatParameters(self.query), FlatParameters(self.key)
            self.update = MomentumUpdate(query, key, sgd_momentum=task.sgd_momentum, weight_decay=task.weight_decay)
            self._numbers = (
                torch.tensor(task.lr, dtype=torch.float64, device=device),
                torch.tensor(task.ema_momentum, dtype=torch.float64, device=device),
                torch.ones((), dtype=torch.bool, device=device),
            )
        else:
            self.optimiser = torch.optim.SGD(
                self.query.parameters(), task.lr, momentum=task.sgd_momentum, weight_decay=task.weight_decay
            )

    def __call__(self, views: Views) -> float:
        if self.update is None:
            self._update_key_encoder()
        loss, k = self.loss(views)
        if self.update is None:
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        else:
            loss.backward()
            self.update.query.collect_gradients()
            self.update(*self._numbers)
        self._enqueue(k)
        self._last_loss = loss.item()
        return self._last_loss

    def read_loss(self) -> float:
        """The loss of the last step."""
        return self._last_loss

    def loss(self, views: Views) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and its keys (N, C), which are detached."""
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype) if low else nullcontext():
            q = F.normalize(self.query(views.query), dim=1)
            with torch.no_grad():
                order = torch.randperm(len(views.key), device=self.device)
                k = F.normalize(self.key(views.key[order]), dim=1)[torch.argsort(order)]
            positives = torch.einsum("nc,nc->n", q, k)[:, None]
            negatives = torch.einsum("nc,ck->nk", q, self.queue.clone())  # a copy: the queue changes before backward
            logits = torch.cat([positives, negatives], dim=1) / self.task.temperature
            return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=self.device)), k

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        m = self.task.ema_momentum
        for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
            key.mul_(m).add_(query, alpha=1.0 - m)

    @torch.no_grad()
    def _enqueue(self, k: Tensor) -> None:
        start, count = int(self.pointer), len(k)
        self.queue[:, start : start + count] = k.T
        self.pointer[0] = (start + count) % self.queue.shape[1]
