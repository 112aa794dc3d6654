"""Sources of keys and negatives: the three mechanisms that He et al. 2020 compare (section 3.2, figure 2).

                 positive of a query          negatives                       gradient into the keys
    queue        the key of the other view    the last K keys                 no: the key encoder is an EMA
    end-to-end   the key of the other view    the batch's other keys          yes
    memory bank  its stored feature           K stored ones of other images   no: there is one encoder

Step, loss, augmentation and evaluation are the same for all; the queue is in `fastmoco.model.key_queue`.

B batch · R ranks that share it · C embedding · K negatives · M images of the data set
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.distributed.world import World
from fastmoco.model.moco import MoCo
from pipelines.randomness import ROUND_A, ROUND_B, WEYL_A, WEYL_B, Domain
from pipelines.views import Views


class ContrastBatch(NamedTuple):
    """The inputs of one InfoNCE loss.

    q          (B/R, C) queries of this rank, with gradient
    k          (B/R, C) their positives, row by row
    negatives  (K, C) of all queries; None if they are the other rows of `keys`
    keys       (B, C) positives of all ranks, of which k are this rank's rows; None if not needed
    """

    q: Tensor
    k: Tensor
    negatives: Tensor | None
    keys: Tensor | None = None


class Dictionary(Protocol):
    """A mechanism, as an `nn.Module` whose buffers are its entire state in steps and checkpoints.

    NAME  prefix of its tensors in a checkpoint
    TIED  whether keys need a gradient, and so a `MoCo` with tied encoders
    """

    NAME: ClassVar[str]
    TIED: ClassVar[bool]

    def contrast_batches(self, model: MoCo, views: Views, symmetric: bool) -> list[ContrastBatch]:
        """The forward pass: the inputs of one loss or more, which are added up."""
        ...

    def update(self, batches: list[ContrastBatch], views: Views, ok: Tensor) -> None:
        """Store keys or features for later steps; if the 0-d bool `ok` is False, change no bit."""
        ...

    def state_dict(self) -> dict[str, Any]: ...


class BatchKeys(nn.Module):
    """End-to-end: the dictionary is the batch, and gradients flow into the encoders of queries and of keys.

    The paper allows different encoders. These are tied: both have one set of weights, so that the step is plain
    gradient descent. There is no state between steps.
    """

    NAME: ClassVar[str] = "batch"
    TIED: ClassVar[bool] = True

    def contrast_batches(self, model: MoCo, views: Views, symmetric: bool) -> list[ContrastBatch]:
        return [ContrastBatch(q, model.world.share(keys), None, keys) for q, keys in model(views, symmetric)]

    def update(self, batches: list[ContrastBatch], views: Views, ok: Tensor) -> None:
        """No state to update."""


class MemoryBank(nn.Module):
    """One stored feature v per image, (M, C) float32 of unit norm (Wu et al. 2018, section 3.2).

    The positive of a query q of image i is the entry v_i, as in their equation 2, so that one encoder and one view are
    enough; a fresh key would need a key encoder, which this mechanism does without. After a step

        v_i ← normalise(momentum · v_i + (1 − momentum) · q)

    The dictionary of a step is drawn once for the batch, as He et al. 2020 describe: `negatives` entries, with
    replacement, of images outside the batch, so that no image is its own negative. Entry n of draw d is a pure function
    of (seed, d, n), computed with Philox on the device; `draws`, the number of steps that changed the bank, is saved in
    checkpoints.

    Initialised with random unit vectors from `generator`, on the CPU. Replicated on all ranks.
    """

    NAME: ClassVar[str] = "bank"
    TIED: ClassVar[bool] = False
    features: Tensor
    draws: Tensor

    def __init__(
        self,
        images: int,
        dim: int,
        generator: torch.Generator,
        *,
        negatives: int,
        momentum: float,
        seed: int,
        world: World | None = None,
    ) -> None:
        super().__init__()
        assert negatives >= 1
        self.world = World(torch.device("cpu")) if world is None else world
        self.negatives, self.momentum, self.seed = negatives, momentum, seed
        self.register_buffer("features", F.normalize(torch.randn(images, dim, generator=generator), dim=1))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def contrast_batches(self, model: MoCo, views: Views, symmetric: bool) -> list[ContrastBatch]:
        assert not symmetric, "there are no keys to exchange with the queries"
        negatives = self.features[self.draw(self.world.all_gather(views.index).wait())]
        return [ContrastBatch(model.queries(views.query), self.features[views.index], negatives)]

    @torch.no_grad()
    def draw(self, index: Tensor) -> Tensor:
        """(K,) int64: images to use as negatives, none of them in `index` (B,), whose entries must be distinct."""
        outside = len(self.features) - len(index)
        assert outside > 0, "there is no image outside the batch"
        slots = torch.arange(-(-self.negatives // 4), device=index.device)
        words = _philox_words(slots, self.draws, (self.seed, Domain.NEGATIVES)).flatten()[: self.negatives]
        n = (words * outside) >> 32
        # Image n of those outside the batch: skip the members of the batch with at most n such images before them.
        outside_before = index.sort().values - torch.arange(len(index), device=index.device)
        return n + torch.searchsorted(outside_before, n, right=True)

    @torch.no_grad()
    def update(self, batches: list[ContrastBatch], views: Views, ok: Tensor) -> None:
        (batch,) = batches
        index = self.world.all_gather(views.index).wait()
        q, stored = self.world.all_gather(batch.q.detach()).wait(), self.features[index]
        new = F.normalize(torch.lerp(q.to(stored.dtype), stored, self.momentum), dim=1)
        self.features.index_copy_(0, index, torch.where(ok, new, stored))
        self.draws.add_(ok)


def _philox_words(slots: Tensor, epoch: Tensor, key: tuple[int, int]) -> Tensor:
    """`pipelines.randomness.philox_words` of the counters (slot, 0, 0, epoch), on their device: (4, n) int64.

    A word is the lower half of an int64. A product of two may exceed 2⁶³: its bits are still right, and the mask
    removes the sign bits that the shift to the lower half brings in.
    """
    low = 0xFFFFFFFF
    c0, c3 = slots, epoch.expand_as(slots)
    c1 = c2 = torch.zeros_like(slots)
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * ROUND_A, c2 * ROUND_B
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + WEYL_A) & low, (k1 + WEYL_B) & low
    return torch.stack([c0, c1, c2, c3])
