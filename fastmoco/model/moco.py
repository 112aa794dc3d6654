"""The two encoders: from views to aligned queries and keys.

B batch · R ranks that share it · C embedding · S side of a view
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.distributed.world import World, all_gather_with_grad
from fastmoco.model.batchnorm.split import divide_groups
from fastmoco.model.encoder import Encoder
from pipelines.views import Views


class MoCo(nn.Module):
    """The query encoder, and a key encoder that starts as its copy and is its moving average (`fastmoco.step.sgd_ema`).

    Both stay in training mode: the key encoder too normalises with the statistics of its batch.

    With `tied`, for end-to-end training, keys have a gradient too: both encoders have the same weights at every step,
    and `TrainStep` adds up their gradients.

    Each rank of `world` embeds its shard of the views and receives the keys of all ranks.
    """

    def __init__(self, query: Encoder, *, tied: bool = False, world: World | None = None) -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(tied)
        self.tied = tied
        self.world = World(next(query.parameters()).device) if world is None else world
        divide_groups(self, self.world)

    def forward(self, views: Views, symmetric: bool) -> list[tuple[Tensor, Tensor]]:
        """Pairs (q, k) of this rank's queries (B/R, C) and all ranks' keys (B, C), float32 of unit norm.

        On rank r, row i of q is from the same image as row rB/R + i of k: `world.share(k)` are the positives. k has a
        gradient only if the encoders are tied.

        Asymmetric: one pair, with all ranks' rows in the order of `views.query`:

            q = f_q(views.query),  k[key_order] = f_k(views.key)

        Symmetric: also the exchanged views, in the order of `views.key`:

            q′ = f_q(views.key),  k′ = f_k(views.query)[key_order]

        In each pair one side passes its encoder in the shuffled order, so that split batch norm groups a query and its
        key with different images (He et al. 2020, section 3.3, "Shuffling BN").
        """
        sides = [(views.query, views.key)] + ([(views.key, views.query)] if symmetric else [])
        # Keys first: gathering them overlaps with the forward pass of the queries, which takes longer.
        pending = [self._gather(self._keys(images)) for _, images in sides]
        q = [self.queries(images) for images, _ in sides]
        k = [wait() for wait in pending]
        k = [_unshuffle(k[0], views.key_order), *(exchanged[views.key_order] for exchanged in k[1:])]
        return list(zip(q, k, strict=True))

    def _gather(self, keys: Tensor) -> Callable[[], Tensor]:
        """Start to gather the (B/R, C) keys of each rank; the returned function waits for the (B, C) of all."""
        if self.tied:
            return lambda: all_gather_with_grad(keys, self.world)
        return self.world.all_gather(keys).wait

    def queries(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, C) of unit norm, with gradient."""
        return _embed(self.query, x)

    def _keys(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.tied and torch.is_grad_enabled()):
            return _embed(self.key, x)


def _embed(encoder: Encoder, x: Tensor) -> Tensor:
    """(B, 3, S, S) → (B, C) float32 of unit norm (float64 from a float64 encoder)."""
    embedding = encoder(x)
    return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)


def _unshuffle(shuffled: Tensor, key_order: Tensor) -> Tensor:
    """k with k[key_order[r]] = shuffled[r]."""
    return torch.empty_like(shuffled).index_copy_(0, key_order, shuffled)
