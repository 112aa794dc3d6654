"""The interface of an optimiser, registered in `fastmoco.registry.OPTIMIZERS`.

P floats of parameters with padding
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastmoco.step.flat_params import FlatParameters


class Optimizer(Protocol):
    """Updates the query encoder from its gradients, and the key encoder as its moving average.

    query, key    flat parameters of the two encoders, with the same layout; query.grads (P,) are the gradients
    sgd_momentum  --sgd-momentum; an optimiser may use it for its own first moment
    weight_decay  --wd, for `query.values[:query.num_decayed]`
    kernels       one of `fastmoco.registry.KERNELS`; without a Triton implementation, torch's is used
    """

    def __init__(
        self,
        query: FlatParameters,
        key: FlatParameters,
        *,
        sgd_momentum: float,
        weight_decay: float,
        kernels: str = "torch",
    ) -> None: ...

    def __call__(self, lr: Tensor, ema_momentum: Tensor, ok: Tensor, scale: Tensor | None = None) -> None:
        """Update in place, with the gradients divided by `scale` (0-d) if given.

        Parameters that are also kept rounded to 16 bits are changed there too (`FlatParameters.rounded`).

        lr, ema_momentum, ok are 0-d on the device. If ok is False, no bit of values and state changes. It must not read
        device values on the host, since the step is captured as a CUDA graph.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Buffers (P,) in the layout of `query`, by their names in a checkpoint."""
        ...
