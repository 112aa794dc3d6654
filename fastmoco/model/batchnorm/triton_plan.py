"""How the batch norm kernels divide a batch among their programs, and the launch of the one that all layers share.

N samples · C channels · H, W sides · s splits · R = N/s · H · W rows of a split
"""

# Compile-time constants are passed as plain values; launch options such as enable_fp_fusion are not parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton
from torch import Tensor

from fastmoco.model.batchnorm.triton_kernels import statistics_kernel
from fastmoco.model.operator import Operator

_TILE = 4096  # elements of a tile: 32 for each thread of four warps, 8 KiB in flight per program in 16 bits
_COUNTERS = 1024  # allocated at once: 8 splits of 14,000 channels
_JOINED = 32  # chunks that are joined at once


@dataclass(frozen=True)
class Plan:
    """The tiling of the matrix (see `triton_kernels`)."""

    rows: int  # of a split
    channels: int
    splits: int
    chunks: int  # of a split
    chunk_rows: int
    block_rows: int
    block_channels: int

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        return self.chunks, triton.cdiv(self.channels, self.block_channels), self.splits

    @cached_property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_R": self.block_rows, "BLOCK_C": self.block_channels, "num_warps": 4, "enable_fp_fusion": True}

    @cached_property
    def sum_blocks(self) -> dict[str, int]:
        """Of the kernels that sum: with 8 warps, a thread's partial sums of a tile fit its registers."""
        joined = min(_JOINED, triton.next_power_of_2(self.chunks))
        return self.blocks | {"num_warps": 8, "BLOCK_U": joined, "SPLITS": triton.next_power_of_2(self.splits)}

    def counters(self, device: torch.device) -> Tensor:
        """Zeros for the counters of arrived programs: one per split and block of channels, and one per block."""
        return counters_of(device, (self.splits + 1) * self.grid[1])


def plan_of(x: Tensor, splits: int, tile: int = _TILE) -> Plan:
    """The tiling of x (N, C, H, W) for programs that hold `tile` elements at a time."""
    return _plan(x.shape, splits, tile, x.device)


@cache
def _plan(shape: torch.Size, splits: int, tile: int, device: torch.device) -> Plan:
    samples, channels, height, width = shape
    rows = samples // splits * height * width
    block_channels = min(128, triton.next_power_of_2(channels))
    block_rows = min(tile // block_channels, triton.next_power_of_2(rows))
    programs = triton.cdiv(channels, block_channels) * splits
    # As many programs as are resident at once, each with a long run of rows; at most 512 partial sums per channel.
    chunks = max(1, min(triton.cdiv(programs_of(device), programs), 512 // splits))
    chunk_rows = triton.cdiv(triton.cdiv(rows, chunks), block_rows) * block_rows
    return Plan(rows, channels, splits, triton.cdiv(rows, chunk_rows), chunk_rows, block_rows, block_channels)


_kept_zeros: dict[tuple[torch.device, int], Tensor] = {}


def counters_of(device: torch.device, count: int) -> Tensor:
    """(count or more,) int32 zeros of the current stream. Kernels that change them leave zeros behind."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _kept_zeros.get((device, stream))
    if kept is None or len(kept) < count:
        kept = _kept_zeros[device, stream] = torch.zeros(max(count, _COUNTERS), dtype=torch.int32, device=device)
    return kept


def programs_of(device: torch.device) -> int:
    """Programs that are resident at once, four for each multiprocessor."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def dense(x: Tensor) -> Tensor:
    """x in the layout that all kernels expect."""
    return x.contiguous(memory_format=torch.channels_last)


def _statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, splits: int, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    plan = plan_of(x, splits)
    partial_mean, partial_square = x.new_empty((2, splits * plan.chunks, plan.channels), dtype=torch.float32)
    mean, scale = _statistics_fake(x, running_mean, running_var, splits)
    statistics_kernel[plan.grid](
        x,
        partial_mean,
        partial_square,
        mean,
        scale,
        running_mean,
        running_var,
        plan.counters(x.device),
        plan.rows,
        plan.channels,
        plan.chunk_rows,
        splits,
        momentum,
        eps,
        **plan.sum_blocks,
    )
    return mean, scale


def _statistics_fake(
    x: Tensor, running_mean: Tensor, running_var: Tensor, splits: int, *_: object
) -> tuple[Tensor, Tensor]:
    mean, scale = (x.new_empty((splits, x.shape[1]), dtype=torch.float32) for _ in range(2))
    return mean, scale


split_statistics = Operator(
    "split_statistics",
    "(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, int splits, float momentum, float eps) -> "
    "(Tensor, Tensor)",
    _statistics,
    _statistics_fake,
    mutates=("running_mean", "running_var"),
)
"""(s, C) float32 mean and 1 / sqrt(var + eps) of each split of a channels-last x; updates the running ones."""
