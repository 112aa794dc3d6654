"""The interface of a loss, registered in `fastmoco.registry.OBJECTIVES`.

B batch · R ranks that share it · C embedding · K negatives
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastmoco.model.dictionaries import ContrastBatch


class Objective(Protocol):
    """A contrastive loss of queries, their positives and negatives.

    temperature  τ, above 0
    kernels      one of `fastmoco.registry.KERNELS`; without a Triton implementation, torch's is used
    """

    def __init__(self, *, temperature: float, kernels: str = "torch") -> None: ...

    def __call__(self, batch: ContrastBatch, rank: int) -> Tensor:
        """The mean loss of this rank's B/R queries, 0-d float32, differentiable in `batch.q` and in tied keys.

        It must not read device values on the host, since the step is captured as a CUDA graph.
        """
        ...

    def chance_loss(self, candidates: int) -> float:
        """The loss at chance: equal similarity to `candidates` keys, one of them the positive."""
        ...
