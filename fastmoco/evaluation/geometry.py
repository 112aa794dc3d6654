"""Measures of how collapsed or spread out a representation is.

N embeddings · C length of an embedding. `alignment` and `uniformity` after Wang & Isola 2020 (alignment and uniformity
on the hypersphere), section 4.1; `effective_rank` after Roy & Vetterli 2007 (a measure of effective dimensionality).
All compute in float64 and normalise their inputs where the definition requires unit norm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024


@torch.no_grad()
def alignment(q: Tensor, k: Tensor) -> float:
    """Mean squared distance of positive pairs (rows i of q and k): 0 (identical) to 4 (opposite).

        (q - k).norm(dim=1).pow(2).mean()        for unit-norm q and k

    q, k (N, C) → float. Raises ValueError on other shapes.
    """
    if q.ndim != 2 or q.shape != k.shape or len(q) == 0:
        raise ValueError(f"alignment needs pairs as two tensors (N, C), got {tuple(q.shape)} and {tuple(k.shape)}")
    return (_unit(q) - _unit(k)).square().sum(1).mean().item()


@torch.no_grad()
def uniformity(x: Tensor, t: float = 2.0) -> float:
    """Logarithm of the mean Gaussian potential of all pairs: 0 if all are equal, lower the more uniformly they spread.

        pdist(x).pow(2).mul(-t).exp().mean().log()        for unit-norm x

    x (N, C), N > 1 → float, without storing the (N, N) distances. In high dimensions the minimum tends to -2t. Raises
    ValueError on other shapes.
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"uniformity needs 2 embeddings (N, C) or more, got {tuple(x.shape)}")
    unit, total = _unit(x), 0.0
    for start in range(0, len(unit), _CHUNK):
        rows = unit[start : start + _CHUNK]
        potential = torch.exp(-t * (2 - 2 * rows @ unit[start:].T).clamp_min(0))
        total += potential.triu(1).sum().item()  # each pair once: row i of the chunk with later columns
    return math.log(total / (len(unit) * (len(unit) - 1) / 2)) if total > 0 else -math.inf


@torch.no_grad()
def effective_rank(x: Tensor) -> float:
    """Effective number of directions: the exponential of the entropy of the normalised singular values.

        s = svdvals(x); p = s / s.sum(); exp(-(p * p.log()).sum())

    x (N, C), not centred → float from 1 (a line) to min(N, C) (isotropic); 0 for a zero matrix. Subtract the mean first
    to measure the spread around it. Raises ValueError on other shapes and on values that are not finite.
    """
    if x.ndim != 2 or x.numel() == 0 or not x.isfinite().all():
        raise ValueError(f"effective rank needs finite embeddings (N, C), got {tuple(x.shape)}")
    s = torch.linalg.svdvals(x.double())
    p = s / s.sum() if s.sum() > 0 else s
    return torch.special.entr(p).sum().exp().item() if s.sum() > 0 else 0.0


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.double(), dim=1)
