"""InfoNCE, the contrastive loss of MoCo.

N queries · C embedding · K queue
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.model.dictionaries import ContrastBatch


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean over i of −log( exp(q_i·k_i / τ) / (exp(q_i·k_i / τ) + Σ_j exp(q_i·queue_j / τ)) ).

    The cross entropy with the positive at index 0:

        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
        F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64))

    written as softplus(logsumexp(negatives) − positive), which needs no concatenation and is accurate for a small loss.
    The gradient flows into q, and into k if it requires one.

    q (N, C), k (N, C), queue (K, C), all of unit norm → 0-d; computed in float32 also under autocast, or in
    float64 if q is.
    van den Oord et al. 2018, equation 4; He et al. 2020, equation 1.
    """
    assert q.shape == k.shape, (q.shape, k.shape)
    assert q.shape[1:] == queue.shape[1:], (q.shape, queue.shape)
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        scaled = q.to(dtype) / temperature
        positive = (scaled * k.to(dtype)).sum(dim=1)
        negatives = torch.logsumexp(scaled @ queue.to(dtype).T, dim=1)
        return F.softplus(negatives - positive).mean()


def in_batch_info_nce(q: Tensor, k: Tensor, temperature: float, first: int = 0) -> Tensor:
    """Mean over i of −log( exp(q_i·k_i / τ) / Σ_j exp(q_i·k_j / τ) ): the keys of the other images are the negatives.

        F.cross_entropy(q @ k.T / temperature, first + torch.arange(N))

    The gradient flows into q and k. The N×N logits are too small for a fused kernel to pay off.

    q (N, C), k (M, C) of unit norm, row i of q from the same image as row first + i of k → 0-d; in float32 also under
    autocast, or in float64 if q is. M is N on one rank; on several, k has the keys of all. He et al. 2020, figure 2a:
    M − 1 negatives, as the positive is among the keys (figure 3).
    """
    assert first + len(q) <= len(k), (q.shape, k.shape, first)
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        logits = q.to(dtype) @ k.to(dtype).T / temperature
        return F.cross_entropy(logits, first + torch.arange(len(q), device=q.device))


class InfoNCE:
    """`info_nce`, or `in_batch_info_nce` if the batch has no negatives (an `objective.Objective`).

    With kernels "triton", `info_nce` is fused (`fastmoco.step.info_nce_triton`).
    """

    def __init__(self, *, temperature: float, kernels: str = "torch") -> None:
        self.temperature = temperature
        self._info_nce = info_nce
        if kernels == "triton":
            from fastmoco.step import info_nce_triton  # Triton comes with torch's CUDA builds only

            self._info_nce = info_nce_triton.info_nce

    def __call__(self, batch: ContrastBatch, rank: int) -> Tensor:
        q, k, negatives, keys = batch
        if negatives is None:
            assert keys is not None
            return in_batch_info_nce(q, keys, self.temperature, first=rank * len(q))
        return self._info_nce(q, k, negatives, self.temperature)

    def chance_loss(self, candidates: int) -> float:
        return math.log(candidates)
