"""The contrastive loss.

N queries · C embedding · K queue
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean over i of −log( exp(q_i·k_i / τ) / (exp(q_i·k_i / τ) + Σ_j exp(q_i·queue_j / τ)) ).

    The cross entropy of finding the positive at index 0:

        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature
        F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64))

    written as softplus(logsumexp(negatives) − positive), which needs no concatenation and keeps its digits where the
    loss is small. The gradient flows into q, and into k where it asks for one.

    q (N, C), k (N, C), queue (K, C), all of unit norm → 0-d; computed in float32 also under autocast, or in
    float64 where q is.
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
