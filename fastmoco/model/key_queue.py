"""The queue of keys: a ring buffer on the device.

K queue · C embedding · N keys to enqueue
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.errors import ConfigError
from fastmoco.model.dictionaries import ContrastBatch
from fastmoco.model.moco import MoCo
from pipelines.views import Views


class KeyQueue(nn.Module):
    """The last K keys, (K, C) float32 of unit norm, and the position of the next one.

    Initialised with random unit vectors from `generator` (on the CPU, so that they are the same on every device). The
    pointer is on the device too, so the host never waits. Replicated bit for bit on all ranks. He et al. 2020,
    algorithm 1 (`enqueue`, `dequeue`).
    """

    NAME: ClassVar[str] = "queue"
    TIED: ClassVar[bool] = False
    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator) -> None:
        if size < 1:
            raise ConfigError(f"the queue has {size} keys; give 1 or more, such as 65536")
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def contrast_batches(self, model: MoCo, views: Views, symmetric: bool) -> list[ContrastBatch]:
        """The fresh keys are the positives, the keys in the queue the negatives."""
        return [ContrastBatch(q, model.world.share(keys), self.keys, keys) for q, keys in model(views, symmetric)]

    def update(self, batches: list[ContrastBatch], views: Views, ok: Tensor) -> None:
        """Enqueue the keys of all ranks; as in the authors' symmetric code, those of view 0 before those of view 1."""
        self.enqueue(torch.cat([batch.keys for batch in reversed(batches) if batch.keys is not None]), ok)

    @torch.no_grad()
    def enqueue(self, k: Tensor, ok: Tensor | None = None) -> None:
        """Replace the N oldest keys by the rows of k, in order; with N > K only the last K rows are kept.

            for row in k: keys[pointer] = row; pointer = (pointer + 1) % K

        k (N, C) of unit norm. If the 0-d bool `ok` is False, no bit of keys and pointer changes.
        """
        size = self.keys.shape[0]
        assert k.shape[1:] == self.keys.shape[1:], (k.shape, self.keys.shape)
        skipped = max(k.shape[0] - size, 0)
        rows = k[skipped:].to(self.keys.dtype)
        position = (self.pointer + torch.arange(skipped, k.shape[0], device=k.device)) % size
        advanced = (self.pointer + k.shape[0]) % size
        if ok is not None:
            rows = torch.where(ok, rows, self.keys[position])
            advanced = torch.where(ok, advanced, self.pointer)
        self.keys.index_copy_(0, position, rows)
        self.pointer.copy_(advanced)
