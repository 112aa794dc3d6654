"""Gradients of all ranks added up while the backward pass still runs.

P floats of parameters with padding · R ranks
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmoco.distributed.world import AsyncResult, World
from fastmoco.step.flat_params import FlatParameters

BUCKET_BYTES = 25 * 2**20  # of gradients in float32: as many as PyTorch's DistributedDataParallel sends at once


class GradientReducer:
    """Replaces the flat gradients of a module by their sum over the ranks: the same bits on all of them.

    The buffer is cut into runs of whole parameters, and each run is on its way as soon as the backward has made all of
    its gradients, the last layers first. They lie where NCCL reads them, so nothing is copied. With one rank nothing
    happens at all.

    DistributedDataParallel would copy gradients into buckets of its own or take `.grad` over for them, which then no
    longer is the buffer that the fused update reads; rebuild those buckets after the first step, and look at the graph
    of every forward, neither of which a captured CUDA graph may do; and wrap the encoder that everyone else names.

    module   whose parameters lie in `flat`
    half     send bfloat16: half the bytes, and sums with the rounding of 8 bits
    overlap  False where gradients are changed after the backward and before `finish`
    """

    def __init__(
        self,
        module: nn.Module,
        flat: FlatParameters,
        world: World,
        *,
        half: bool = False,
        overlap: bool = True,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        assert flat.grads is not None
        self._world, self._half = world, half
        self._buckets: list[Tensor] = []
        self._pending: list[tuple[Tensor, AsyncResult]] = []
        self._counts: list[int] = []
        if world.size == 1:
            return
        parts = _cut(module, flat, bucket_bytes)
        for number, (names, part) in enumerate(parts):
            self._buckets.append(flat.grads[part])
            self._counts.append(len(names))
            if overlap:
                for name in names:
                    module.get_parameter(name).register_post_accumulate_grad_hook(self._arrived(number))
        self._missing = list(self._counts)

    @property
    def bytes(self) -> int:
        """What a rank contributes to every step."""
        return sum(bucket.numel() for bucket in self._buckets) * (2 if self._half else 4)

    def finish(self) -> None:
        """After the backward: sends what is left, and has the stream (on a CPU, the host) wait for all sums."""
        while len(self._pending) < len(self._buckets):
            self._send()
        for bucket, pending in self._pending:
            total = pending.wait()
            if total is not bucket:
                bucket.copy_(total)
        self._pending.clear()
        if self._buckets:
            self._missing = list(self._counts)

    def _arrived(self, number: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            self._missing[number] -= 1
            # In one order on all ranks, as collectives must be: a bucket waits for those before it.
            while len(self._pending) < len(self._buckets) and self._missing[len(self._pending)] <= 0:
                self._send()

        return hook

    def _send(self) -> None:
        bucket = self._buckets[len(self._pending)]
        message = bucket.to(torch.bfloat16) if self._half else bucket
        self._pending.append((bucket, self._world.all_reduce(message)))


def _cut(module: nn.Module, flat: FlatParameters, bucket_bytes: int) -> list[tuple[list[str], slice]]:
    """Runs of parameters of at most so many bytes (or one parameter), in the order in which their gradients come.

    A gradient comes the later, the earlier its layer is in the forward pass; the order of registration stands for that.
    """
    place = {name: number for number, (name, _) in enumerate(module.named_parameters())}
    ends = [*(slot.offset for slot in flat.slots[1:]), len(flat.values)]
    runs: list[tuple[list[str], slice]] = []
    most = bucket_bytes // flat.values.element_size()
    for slot, end in zip(flat.slots, ends, strict=True):
        if runs and end - runs[-1][1].start <= most and slot.offset != flat.num_decayed:
            names, part = runs[-1]
            runs[-1] = ([*names, slot.name], slice(part.start, end))
        else:
            runs.append(([slot.name], slice(slot.offset, end)))
    return sorted(runs, key=lambda run: min(place[name] for name in run[0]), reverse=True)
