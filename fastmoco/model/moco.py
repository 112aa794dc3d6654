"""The two encoders: from views to aligned queries and keys.

B batch · R ranks that share it · C embedding · S side of a view
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastmoco.distributed.world import World, all_gather_with_grad
from fastmoco.model.batchnorm.split import divide_groups, shares_groups
from fastmoco.model.encoder import Encoder
from pipelines.views import Views

_MOST_COMPILED = 64  # kinds of encoders in one process


class MoCo(nn.Module):
    """The query encoder, and a key encoder that starts as its copy and is its moving average (`fastmoco.step.sgd_ema`).

    Both stay in training mode: the key encoder too normalises with the statistics of its batch.

    With `tied`, for end-to-end training, keys have a gradient too: both encoders have the same weights at every step,
    and `TrainStep` adds up their gradients.

    `weights` of the query and of the key encoder, by name, replace parameters in a forward: see
    `FlatParameters.keep_rounded`.

    Each rank of `world` embeds its shard of the views and receives the keys of all ranks.
    """

    def __init__(self, query: Encoder, *, tied: bool = False, world: World | None = None) -> None:
        super().__init__()
        self.query = query
        self.key = copy.deepcopy(query).requires_grad_(tied)
        self.tied = tied
        self.weights: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        self._embed = _embed
        self.world = World(next(query.parameters()).device) if world is None else world
        divide_groups(self, self.world)

    def compile_encoders(self, **options: Any) -> None:
        """Compile what embeds queries and keys, from views to unit vectors, as one graph each.

        options  of `torch.compile`, such as `mode`
        """
        # Steps that are compared in one process share what was compiled where their encoders are alike, and otherwise
        # add to it; at the usual limit of 8 it would be an error.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_COMPILED)
        whole = not shares_groups(self)  # collectives inside of an encoder are not compiled
        self._embed = torch.compile(_embed, fullgraph=whole, dynamic=False, **options)

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
        return self._embed(self.query, self.weights[0], x)

    def _keys(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.tied and torch.is_grad_enabled()):
            return self._embed(self.key, self.weights[1], x)


def _embed(encoder: Encoder, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """(B, 3, S, S) → (B, C) float32 of unit norm (float64 from a float64 encoder)."""
    embedding = functional_call(encoder, weights, x) if weights else encoder(x)
    return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)


def _unshuffle(shuffled: Tensor, key_order: Tensor) -> Tensor:
    """k with k[key_order[r]] = shuffled[r]."""
    return torch.empty_like(shuffled).index_copy_(0, key_order, shuffled)
