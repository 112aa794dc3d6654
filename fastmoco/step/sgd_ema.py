"""The update: SGD of the query encoder and the moving average of the key encoder.

P floats of parameters with padding
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco.step.flat_params import FlatParameters

_CPU_CHUNK = 2**16  # floats, so that all temporaries stay in the L2 cache


@torch.no_grad()
def momentum_update(
    query: Tensor,
    key: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: Tensor,
    ema_momentum: Tensor,
    sgd_momentum: float,
    weight_decay: float,
    num_decayed: int,
    ok: Tensor,
) -> None:
    """In place, with θ the query parameters, φ the key parameters, g the gradients and u the momentum buffer:

        g[:num_decayed] += weight_decay · θ[:num_decayed]
        u = sgd_momentum · u + g
        θ = θ − lr · u
        φ = ema_momentum · φ + (1 − ema_momentum) · θ

    The first three lines are `torch.optim.SGD` (its first step, u = g, is that of u = 0). The last line has the updated
    θ: φ is for the keys of the next step, as in the authors' code, which averages when that step begins.

    query, key, grads, momentum_buffer (P,) float32; lr, ema_momentum 0-d floating, ok 0-d bool, on the same device.
    If ok is False, no bit of query, key and momentum_buffer changes, whatever the gradients. `grads` is never changed.
    He et al. 2020, equation 2 and algorithm 1.
    """
    # 1 − m in the precision of the caller: in float32, 1 − 0.999 is wrong in the fifth digit.
    one_minus_m = (1.0 - ema_momentum).to(key.dtype)
    size = len(query)
    chunk_size = _CPU_CHUNK if query.device.type == "cpu" else size
    for start in range(0, size, chunk_size):
        chunk = slice(start, start + chunk_size)
        new_buffer = torch.add(grads[chunk], momentum_buffer[chunk], alpha=sgd_momentum)
        decayed = min(len(new_buffer), max(0, num_decayed - start))
        if weight_decay and decayed:
            new_buffer[:decayed].add_(query[chunk][:decayed], alpha=weight_decay)
        new_query = query[chunk] - lr * new_buffer
        new_key = torch.lerp(key[chunk], new_query, one_minus_m)
        for old, new in ((momentum_buffer, new_buffer), (query, new_query), (key, new_key)):
            torch.where(ok, new, old[chunk], out=old[chunk])


class MomentumUpdate:
    """`momentum_update` of two modules with the same layout, with its SGD momentum buffer (P,).

    With kernels "triton" the whole call is one pass over the parameters (`fastmoco.step.sgd_ema_triton`).
    """

    def __init__(
        self,
        query: FlatParameters,
        key: FlatParameters,
        *,
        sgd_momentum: float,
        weight_decay: float,
        kernels: str = "torch",
    ) -> None:
        assert query.slots == key.slots, "the encoders differ in layout"
        assert query.num_decayed == key.num_decayed, "the encoders differ in which parameters decay"
        self.query = query
        self.key = key
        self.sgd_momentum = sgd_momentum
        self.weight_decay = weight_decay
        self.kernels = kernels
        self.momentum_buffer = torch.zeros_like(query.values)

    def __call__(self, lr: Tensor, ema_momentum: Tensor, ok: Tensor, scale: Tensor | None = None) -> None:
        """Update with the gradients divided by `scale` (0-d float32), and the rounded parameters if there are any."""
        grads = self.query.grads
        assert grads is not None
        buffers = self.query.values, self.key.values, grads, self.momentum_buffer
        settings: dict[str, Any] = {
            "lr": lr,
            "ema_momentum": ema_momentum,
            "sgd_momentum": self.sgd_momentum,
            "weight_decay": self.weight_decay,
            "num_decayed": self.query.num_decayed,
            "ok": ok,
        }
        if self.kernels == "triton":
            from fastmoco.step import sgd_ema_triton  # Triton comes with torch's CUDA builds only

            rounded = self.query.rounded, self.key.rounded
            sgd_ema_triton.momentum_update(*buffers, **settings, scale=scale, rounded=rounded)
            return
        if scale is not None:
            grads.div_(scale)
        momentum_update(*buffers, **settings)
        for flat in (self.query, self.key):
            flat.round()

    def state(self) -> dict[str, Tensor]:
        return {"momentum_buffer": self.momentum_buffer}
