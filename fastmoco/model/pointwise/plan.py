"""How the kernels of the 1×1 convolutions divide their work among programs.

It follows from shapes and types alone: nothing is measured in the step, which may be under capture.

s splits · R rows (pixels) of a split · I input channels · O output channels
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastmoco.model.batchnorm.triton_plan import counters_of, programs_of

_PARTS = 512  # of the sums over the rows of a channel, at most
_JOINED = 16  # of them are joined at once


class Blocks(NamedTuple):
    """A tile of a product, and the columns that one step of its loop multiplies."""

    rows: int
    channels: int
    inner: int
    warps: int
    stages: int


def blocks_of(rows: int, channels: int, inner: int, x: Tensor) -> Blocks:
    """128×64 results for eight warps, 32 accumulators for each thread: with more, their epilogues spill registers.

    Half the width needs twice the reads of the other operand, which the L2 cache answers. Exact float32 products are
    not made by tensor cores and keep their operands in registers: 64×64.
    """
    exact = exact_products(x)
    inner_most = 16 if exact else 128 // x.element_size()
    return Blocks(_fitting(rows, 64 if exact else 128), _fitting(channels, 64), _fitting(inner, inner_most), 8, 3)


def exact_products(x: Tensor) -> bool:
    """Whether products of float32 may not be rounded to TF32: as torch decides for its convolutions."""
    return x.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32


def precision_of(x: Tensor) -> dict[str, object]:
    """How a product of x is computed."""
    return {"PRECISION": "ieee" if exact_products(x) else "tf32", "WIDEN": not x.is_cuda, "enable_fp_fusion": True}


class ProductPlan(NamedTuple):
    """The tiling of f(x) @ matrix with x (s·R, I), in chunks of the rows of a split, whose sums are joined."""

    rows: int
    inner: int
    channels: int
    splits: int
    chunks: int
    chunk_rows: int
    blocks: Blocks

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.chunks, triton.cdiv(self.channels, self.blocks.channels), self.splits

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.rows, self.inner, self.channels, self.chunk_rows, self.splits

    @property
    def constants(self) -> dict[str, int]:
        blocks = self.blocks
        return {
            "BLOCK_R": blocks.rows,
            "BLOCK_C": blocks.channels,
            "BLOCK_I": blocks.inner,
            "BLOCK_U": _JOINED,
            "SPLITS": triton.next_power_of_2(self.splits),
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }

    def counters(self, device: torch.device) -> Tensor:
        return counters_of(device, (self.splits + 1) * self.grid[1])

    def tile_sums(self, x: Tensor) -> Tensor:
        """Room for two sums of every tile of rows and channel, (2, tiles, O) float32."""
        tiles = self.splits * triton.cdiv(self.rows, self.blocks.rows)
        return x.new_empty((2, tiles, self.channels), dtype=torch.float32)

    def chunk_sums(self, x: Tensor) -> Tensor:
        """Room for two sums of every chunk and channel, (2, s·U, O) float32."""
        return x.new_empty((2, self.splits * self.chunks, self.channels), dtype=torch.float32)


def plan_product(
    x: Tensor, channels: int, splits: int, *, activated: bool = False, residual: bool = False
) -> ProductPlan:
    """The product of x (N, I, H, W) and a matrix, with `channels` columns in the result.

    activated  whether a batch norm and ReLU are applied to x on the way
    residual   whether a residual is added, too: with as wide tiles of both, registers are spilled, and on sm_120
               without it
    """
    samples, inner, height, width = x.shape
    rows = samples // splits * height * width
    blocks = blocks_of(rows, channels, inner, x)
    if residual or (activated and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 12):
        blocks = blocks._replace(inner=max(16, blocks.inner // 2))
    programs = triton.cdiv(channels, blocks.channels) * splits
    chunks = max(1, min(triton.cdiv(programs_of(x.device), programs), _PARTS // splits))
    chunk_rows = triton.cdiv(triton.cdiv(rows, chunks), blocks.rows) * blocks.rows
    return ProductPlan(rows, inner, channels, splits, triton.cdiv(rows, chunk_rows), chunk_rows, blocks)


class MatrixPlan(NamedTuple):
    """The tiling of gradᵀ @ f(x), with grad (s·R, O) and x (s·R, C), in chunks of blocks of rows over all splits."""

    rows: int
    outer: int
    channels: int
    row_blocks: int  # of all splits
    chunks: int
    chunk_blocks: int
    blocks: Blocks

    @property
    def grid(self) -> tuple[int, int, int]:
        blocks = self.blocks
        return self.chunks, triton.cdiv(self.outer, blocks.rows), triton.cdiv(self.channels, blocks.channels)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.rows, self.outer, self.channels, self.row_blocks, self.chunk_blocks

    @property
    def constants(self) -> dict[str, int]:
        blocks = self.blocks
        return {
            "BLOCK_R": blocks.inner,
            "BLOCK_O": blocks.rows,
            "BLOCK_C": blocks.channels,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }


def plan_matrix(x: Tensor, outer: int, splits: int) -> MatrixPlan:
    """The gradient (outer, C) of the matrix that x (N, C, H, W) was multiplied with."""
    samples, channels, height, width = x.shape
    rows = samples // splits * height * width
    blocks = blocks_of(outer, channels, rows, x)
    row_blocks = splits * triton.cdiv(rows, blocks.inner)
    tiles = triton.cdiv(outer, blocks.rows) * triton.cdiv(channels, blocks.channels)
    # Every part is written and read once more: two programs for each multiprocessor rather than four.
    chunks = max(1, min(triton.cdiv(programs_of(x.device) // 2, tiles), row_blocks))
    chunk_blocks = triton.cdiv(row_blocks, chunks)
    return MatrixPlan(rows, outer, channels, row_blocks, triton.cdiv(row_blocks, chunk_blocks), chunk_blocks, blocks)


def _fitting(size: int, most: int) -> int:
    """A power of two that tensor cores can multiply: 16 or more."""
    return max(16, min(most, triton.next_power_of_2(size)))
