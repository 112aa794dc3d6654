"""The two encoders: views in, aligned queries and keys out.

B batch · C embedding · S side of a view
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.encoder import Encoder
from pipelines.views import Views


class MoCo(nn.Module):
    """A query encoder that learns, and a key encoder that starts as its copy and follows it (`fastmoco.momentum`).

    Both stay in training mode: the key encoder normalises with the statistics of its batch too.

    With `twins`, for end-to-end training, keys have a gradient too: the key encoder is the query encoder's twin, of the
    same weights at every step, and `TrainStep` adds up the gradients of both.
    """

    def __init__(self, query: Encoder, *, twins: bool = False) -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(twins)
        self.twins = twins

    def forward(self, views: Views, symmetric: bool) -> list[tuple[Tensor, Tensor]]:
        """Pairs (q, k), each (B, C) float32 of unit norm with row i of both from the same image.

        k has a gradient only where the encoders are twins.

        Asymmetric, one pair in the order of `views.query`:

            q = f_q(views.query),  k[key_order] = f_k(views.key)

        Symmetric, also the exchanged views, in the order of `views.key`:

            q′ = f_q(views.key),  k′ = f_k(views.query)[key_order]

        In each pair one side went through its encoder in the shuffled order, so that split batch norm groups a query
        and its key with different images (He et al. 2020, section 3.3, "Shuffling BN").
        """
        pairs = [(self.queries(views.query), _unshuffle(self._keys(views.key), views.key_order))]
        if symmetric:
            pairs.append((self.queries(views.key), self._keys(views.query)[views.key_order]))
        return pairs

    def queries(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, C) of unit norm, with gradient."""
        return _embed(self.query, x)

    def _keys(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.twins and torch.is_grad_enabled()):
            return _embed(self.key, x)


def _embed(encoder: Encoder, x: Tensor) -> Tensor:
    """(B, 3, S, S) → (B, C) float32 of unit norm (float64 from a float64 encoder)."""
    embedding = encoder(x)
    return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)


def _unshuffle(shuffled: Tensor, key_order: Tensor) -> Tensor:
    """k with k[key_order[r]] = shuffled[r]."""
    return torch.empty_like(shuffled).index_copy_(0, key_order, shuffled)
