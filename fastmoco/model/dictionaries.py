"""Where keys and negatives come from: the three mechanisms that He et al. 2020 compare (section 3.2, figure 2).

                 positive of a query          negatives                     both encoders learn
    queue        the key of the other view    the last K keys               no: the key encoder follows
    end-to-end   the key of the other view    the batch's other keys        yes
    memory bank  the stored feature           K stored ones of other images no: there is only one

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
    """What one InfoNCE compares.

    q          (B/R, C) queries of this rank, with gradient
    k          (B/R, C) their positives, row by row
    negatives  (K, C) for all of them; None where those are the other rows of `keys`
    keys       (B, C) all ranks' positives, of which k are this one's share; None where nobody needs them
    """

    q: Tensor
    k: Tensor
    negatives: Tensor | None
    keys: Tensor | None = None


class Dictionary(Protocol):
    """A mechanism, as an `nn.Module` whose buffers are all that a step changes in it and a checkpoint holds.

    NAME   what its tensors are called by in a checkpoint
    TIED  whether keys need a gradient, and so a `MoCo` of twins
    """

    NAME: ClassVar[str]
    TIED: ClassVar[bool]

    def contrast_batches(self, model: MoCo, views: Views, symmetric: bool) -> list[ContrastBatch]:
        """The forward pass: what is to be told apart. Their losses add up."""
        ...

    def update(self, batches: list[ContrastBatch], views: Views, ok: Tensor) -> None:
        """What a step leaves for later ones; nothing, bit for bit, where the 0-d bool `ok` is False."""
        ...

    def state_dict(self) -> dict[str, Any]: ...


class BatchKeys(nn.Module):
    """End-to-end: the dictionary is the batch, and gradients flow into the encoders of queries and of keys.

    Of what the paper allows ("the two encoders can be different"), ours are the same: twins of one set of weights, so
    that the step is plain gradient descent on those. Nothing is kept between steps.
    """

    NAME: ClassVar[str] = "batch"
    TIED: ClassVar[bool] = True

    def contrast_batches(self, model: MoCo, views: Views, symmetric: bool) -> list[ContrastBatch]:
        return [ContrastBatch(q, model.world.share(keys), None, keys) for q, keys in model(views, symmetric)]

    def update(self, batches: list[ContrastBatch], views: Views, ok: Tensor) -> None:
        """Nothing to remember."""


class MemoryBank(nn.Module):
    """One feature v of every image, (M, C) float32 of unit norm (Wu et al. 2018, section 3.2).

    The positive of a query q of image i is its own entry v_i, as it is there (equation 2), so that one encoder and one
    view do; a fresh key would need the key encoder that this mechanism is compared with. After a step

        v_i ← normalise(momentum · v_i + (1 − momentum) · q)

    The dictionary of a step is drawn for the whole batch, as He et al. 2020 describe it: `negatives` entries with
    replacement, of the images outside the batch, so that no image is its own negative. Entry number n of draw d is a
    pure function of (seed, d, n), from Philox on the device; `draws`, the number of steps that changed the bank, is in
    the checkpoint.

    It starts with random unit vectors drawn from `generator`, on the CPU. Every rank holds all of it.
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
        others = self.features[self.draw(self.world.all_gather(views.index).wait())]
        return [ContrastBatch(model.queries(views.query), self.features[views.index], others)]

    @torch.no_grad()
    def draw(self, index: Tensor) -> Tensor:
        """(K,) int64: images to contrast with, none of them in `index` (B,), whose entries are all different."""
        outside = len(self.features) - len(index)
        assert outside > 0, "there is no image outside the batch"
        slots = torch.arange(-(-self.negatives // 4), device=index.device)
        words = _philox_words(slots, self.draws, (self.seed, Domain.NEGATIVES)).flatten()[: self.negatives]
        rank = (words * outside) >> 32
        # Image number `rank` of those outside: past every member of the batch that has at most so many before it.
        before = index.sort().values - torch.arange(len(index), device=index.device)
        return rank + torch.searchsorted(before, rank, right=True)

    @torch.no_grad()
    def update(self, batches: list[ContrastBatch], views: Views, ok: Tensor) -> None:
        (contrast,) = batches
        index = self.world.all_gather(views.index).wait()
        q, stored = self.world.all_gather(contrast.q.detach()).wait(), self.features[index]
        new = F.normalize(torch.lerp(q.to(stored.dtype), stored, self.momentum), dim=1)
        self.features.index_copy_(0, index, torch.where(ok, new, stored))
        self.draws.add_(ok)


def _philox_words(slots: Tensor, epoch: Tensor, key: tuple[int, int]) -> Tensor:
    """`pipelines.randomness.philox_words` of the counters (slot, 0, 0, epoch) where they lie: (4, n) int64.

    Words are the lower half of an int64. A product of two may pass 2⁶³: its bits are right all the same, and the shift
    that brings the upper half down drags in signs, which the mask removes.
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
