"""The dictionary of keys: a ring buffer on the device.

K queue · C embedding · N keys that enter
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
    """The last K keys, (K, C) float32 of unit norm, and where the next one goes.

    It starts with random unit vectors drawn from `generator` (on the CPU, so that they are the same on every device).
    Nothing here reads the device from the host: the pointer lives there too. Every rank holds all of it, the same bits.
    He et al. 2020, algorithm 1 (`enqueue`, `dequeue`).
    """

    NAME: ClassVar[str] = "queue"
    TIED: ClassVar[bool] = False
    keys: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator) -> None:
        if size < 1:
            raise ConfigError(f"the queue holds {size} keys; give 1 or more, such as 65536")
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def contrast_batches(self, model: MoCo, views: Views, symmetric: bool) -> list[ContrastBatch]:
        """Fresh keys are the positives, all that the queue holds the negatives."""
        return [ContrastBatch(q, model.world.share(keys), self.keys, keys) for q, keys in model(views, symmetric)]

    def update(self, batches: list[ContrastBatch], views: Views, ok: Tensor) -> None:
        """The keys of all ranks enter; as in the authors' symmetric code, those of view 0 before those of view 1."""
        self.enqueue(torch.cat([contrast.keys for contrast in reversed(batches) if contrast.keys is not None]), ok)

    @torch.no_grad()
    def enqueue(self, k: Tensor, ok: Tensor | None = None) -> None:
        """Replaces the N oldest keys by the rows of k, in order; with N > K only the last K rows are kept.

            for row in k: keys[pointer] = row; pointer = (pointer + 1) % K

        k (N, C) of unit norm. Where the 0-d bool `ok` is False, keys and pointer stay bit for bit as they were.
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
