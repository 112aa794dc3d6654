"""What a loss offers, to be entered in `fastmoco.registry.OBJECTIVES`.

B batch · R ranks that share it · C embedding · K negatives
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastmoco.model.dictionaries import ContrastBatch


class Objective(Protocol):
    """A contrastive loss of queries, their positives and negatives.

    temperature  τ, above 0
    kernels      one of `fastmoco.registry.KERNELS`; where there is no Triton implementation, torch's is used
    """

    def __init__(self, *, temperature: float, kernels: str = "torch") -> None: ...

    def __call__(self, batch: ContrastBatch, rank: int) -> Tensor:
        """The mean loss of this rank's B/R queries, 0-d float32, differentiable in `batch.q` and keys that require it.

        It may read nothing on the host: the step is captured as a CUDA graph.
        """
        ...

    def chance_loss(self, candidates: int) -> float:
        """The loss of an encoder that cannot tell `candidates` keys apart, one of them the positive."""
        ...
