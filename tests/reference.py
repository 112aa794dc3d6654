"""MoCo as the paper writes it, in loops that anyone can follow: what the fast code is compared with.

He et al. 2020, algorithm 1, and what the authors' code adds: the EMA opens the step, losses and keys of both directions
add up when symmetric, batch norm per group with running statistics averaged over groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class LoopBatchNorm(nn.Module):
    """Normalises each of `splits` runs of consecutive samples by its own mean and variance."""

    def __init__(self, channels: int, splits: int) -> None:
        super().__init__()
        self.splits = splits
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        outputs, means, variances = [], [], []
        for group in x.chunk(self.splits):
            mean, variance = group.mean(dim=(0, 2, 3)), group.var(dim=(0, 2, 3), unbiased=False)
            count = group.numel() // group.shape[1]
            normalised = (group - mean[:, None, None]) / torch.sqrt(variance[:, None, None] + 1e-5)
            outputs.append(normalised * self.weight[:, None, None] + self.bias[:, None, None])
            means.append(mean.detach())
            variances.append(variance.detach() * count / (count - 1))
        self.running_mean = 0.9 * self.running_mean + 0.1 * torch.stack(means).mean(dim=0)
        self.running_var = 0.9 * self.running_var + 0.1 * torch.stack(variances).mean(dim=0)
        return torch.cat(outputs)


def narrow_resnet(arch: str, width: float, norm: Callable[[int], nn.Module]) -> nn.Module:
    """torchvision's model with every channel count scaled, `norm(channels)` for batch norm, and the CIFAR stem."""
    model = torchvision.models.get_model(arch)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            inputs = 3 if layer.in_channels == 3 else int(layer.in_channels * width)
            narrow: nn.Module = nn.Conv2d(
                inputs,
                int(layer.out_channels * width),
                3 if name == "conv1" else layer.kernel_size,  # pyright: ignore[reportArgumentType]
                1 if name == "conv1" else layer.stride,  # pyright: ignore[reportArgumentType]
                1 if name == "conv1" else layer.padding,  # pyright: ignore[reportArgumentType]
                bias=False,
            )
        elif isinstance(layer, nn.BatchNorm2d):
            narrow = norm(int(layer.num_features * width))
        else:
            continue
        model.set_submodule(name, narrow)
    model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    return model


class ReferenceMoCo:
    """Algorithm 1. `f_q` and `f_k` are any two modules with equal parameters; `queue` is (K, C) of unit norm."""

    def __init__(
        self,
        f_q: nn.Module,
        f_k: nn.Module,
        queue: Tensor,
        *,
        temperature: float,
        lr: float,
        sgd_momentum: float,
        weight_decay: float,
        ema_momentum: float,
        symmetric: bool,
    ) -> None:
        self.f_q, self.f_k, self.queue, self.pointer = f_q, f_k, queue, 0
        self.temperature, self.ema_momentum, self.symmetric = temperature, ema_momentum, symmetric
        self.sgd = torch.optim.SGD(f_q.parameters(), lr=lr, momentum=sgd_momentum, weight_decay=weight_decay)

    def average_key_encoder(self) -> None:
        m = self.ema_momentum
        for p_q, p_k in zip(self.f_q.parameters(), self.f_k.parameters(), strict=True):
            p_k.data = m * p_k.data + (1.0 - m) * p_q.data

    def contrast(self, x_q: Tensor, x_k: Tensor, order: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Loss and keys; row i of the query view belongs to row order[i] of the key view."""
        q = F.normalize(self.f_q(x_q), dim=1)
        with torch.no_grad():
            k = F.normalize(self.f_k(x_k), dim=1)[torch.as_tensor(order)]
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
        negatives = torch.einsum("nc,kc->nk", q, self.queue)
        logits = torch.cat([positive, negatives], dim=1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64)), k

    def step(self, view_0: Tensor, view_1_shuffled: Tensor, key_order: Sequence[int]) -> float:
        self.average_key_encoder()
        inverse = [list(key_order).index(i) for i in range(len(key_order))]
        loss, keys = self.contrast(view_0, view_1_shuffled, inverse)
        if self.symmetric:
            other_loss, other_keys = self.contrast(view_1_shuffled, view_0, key_order)
            loss, keys = loss + other_loss, torch.cat([other_keys, keys])
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        for key in keys:
            self.queue[self.pointer] = key
            self.pointer = (self.pointer + 1) % len(self.queue)
        return loss.item()
