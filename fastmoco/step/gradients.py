"""The sum of all ranks' gradients, overlapped with the backward pass.

P floats of parameters with padding · R ranks
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmoco.distributed.world import AsyncResult, World
from fastmoco.step.flat_params import FlatParameters

BUCKET_BYTES = 25 * 2**20  # of gradients in float32, as in PyTorch's DistributedDataParallel


class GradientReducer:
    """Replaces the flat gradients of a module by their sum over the ranks, with the same bits on all of them.

    The buffer is divided into buckets of whole parameters. With `overlaps`, a bucket is collected and all-reduced in
    place as soon as the backward pass has produced all of its gradients, the last layers first; otherwise they have
    been collected (`FlatParameters.collect_gradients`) when `finish` is called. With one rank nothing is done.

    Not DistributedDataParallel: it copies gradients into its own buckets, and the fused update would not read those; it
    rebuilds the buckets after the first step and traverses the autograd graph of
    every forward, which a CUDA graph cannot do; and it wraps the encoder, which changes the names of its parameters.

    module   its parameters are in `flat`
    half     send bfloat16: half the bytes, and sums rounded to 8 bits
    overlap  must be False if gradients are changed between the backward and `finish`

    Leaves of `flat` must not be replaced after construction.
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
        self._world, self._half, self._flat = world, half, flat
        self.overlaps = overlap and world.size > 1
        self._buckets: list[Tensor] = []
        self._pending: list[tuple[Tensor, AsyncResult]] = []
        self._names: list[list[str]] = []
        if world.size == 1:
            return
        for number, (names, extent) in enumerate(_divide(module, flat, bucket_bytes)):
            self._buckets.append(flat.grads[extent])
            self._names.append(names)
            if overlap:
                for name in names:
                    flat.leaves[name].register_post_accumulate_grad_hook(self._on_gradient(number))
        self._missing = self._counts()

    @property
    def bytes(self) -> int:
        """Bytes that a rank contributes to the sums of a step."""
        return sum(bucket.numel() for bucket in self._buckets) * (2 if self._half else 4)

    def finish(self) -> None:
        """After the backward: send the remaining buckets; the stream (on a CPU, the host) waits for all sums."""
        while len(self._pending) < len(self._buckets):
            self._send()
        for bucket, pending in self._pending:
            total = pending.wait()
            if total is not bucket:
                bucket.copy_(total)
        self._pending.clear()
        if self._buckets:
            self._missing = self._counts()

    def _counts(self) -> list[int]:
        return [len(names) for names in self._names]

    def _on_gradient(self, number: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            self._missing[number] -= 1
            # Collectives must be in the same order on all ranks: a bucket waits for those before it.
            while len(self._pending) < len(self._buckets) and self._missing[len(self._pending)] <= 0:
                self._send()

        return hook

    def _send(self) -> None:
        number = len(self._pending)
        bucket = self._buckets[number]
        if self.overlaps:
            self._flat.collect_gradients(self._names[number])
        message = bucket.to(torch.bfloat16) if self._half else bucket
        self._pending.append((bucket, self._world.all_reduce(message)))


def _divide(module: nn.Module, flat: FlatParameters, bucket_bytes: int) -> list[tuple[list[str], slice]]:
    """Buckets of consecutive parameters, at most `bucket_bytes` or one parameter each, in the order of their gradients.

    The backward pass reverses the order of the layers in the forward pass, for which the order of registration is used.
    """
    position = {name: number for number, (name, _) in enumerate(module.named_parameters())}
    ends = [*(slot.offset for slot in flat.slots[1:]), len(flat.values)]
    buckets: list[tuple[list[str], slice]] = []
    max_size = bucket_bytes // flat.values.element_size()
    for slot, end in zip(flat.slots, ends, strict=True):
        if buckets and end - buckets[-1][1].start <= max_size and slot.offset != flat.num_decayed:
            names, extent = buckets[-1]
            buckets[-1] = ([*names, slot.name], slice(extent.start, end))
        else:
            buckets.append(([slot.name], slice(slot.offset, end)))
    return sorted(buckets, key=lambda bucket: min(position[name] for name in bucket[0]), reverse=True)
