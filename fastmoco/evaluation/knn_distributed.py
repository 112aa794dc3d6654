"""Weighted kNN with the bank and the queries sharded over ranks; the result is that of a single rank.

N images in the bank · M queries · R ranks · D length of a feature · k neighbours
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.distributed.world import World
from fastmoco.evaluation.budget import SharedOutOfMemoryError, is_out_of_memory
from fastmoco.evaluation.features import BATCH
from fastmoco.evaluation.knn import count_votes, knn_accuracy, top_k_neighbours

_CHUNK_BYTES = 256 * 2**20  # for a chunk's similarities to a rank's shard and its neighbours gathered from all ranks
_NO_MEMORY = -1  # sent instead of the length of a feature


def shard(positions: np.ndarray, ranks: int, batch: int = BATCH) -> tuple[list[np.ndarray], int]:
    """Contiguous shards of the positions, one per rank, and the batch size: `batch`, or fewer for fewer images, of
    which some shards are then empty.

    Shards end at batch boundaries: a feature is computed in the same batch as on a single rank, so its bits are equal.
    """
    batch = min(batch, len(positions))
    batches = -(-len(positions) // batch)
    ends = [batches * (rank + 1) // ranks * batch for rank in range(ranks)]
    return np.split(positions, ends[:-1]), batch


def gather_rows(rows: Tensor, counts: list[int], world: World) -> Tensor:
    """All-gather of tensors with different numbers of rows, counts[r] on rank r → (sum of counts, …) in rank order."""
    if world.size == 1:
        return rows
    max_count = max(counts)
    padded = rows.new_zeros((max_count, *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = world.all_gather(padded).wait().split(max_count)
    return torch.cat([block[:count] for block, count in zip(gathered, counts, strict=True)])


@torch.no_grad()
def distributed_knn_accuracy(
    extract: Callable[[int, np.ndarray, int], Tensor],
    positions: tuple[np.ndarray, np.ndarray],
    labels: tuple[Tensor, Tensor],
    world: World,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    widths: Sequence[int],
    batch: int = BATCH,
) -> list[float]:
    """`knn_accuracy` of a bank and queries whose features are extracted by all ranks, one for each space in `widths`.

    extract    (0 for the bank or 1 for the queries, positions, batch size) → (n, D) float32 on the device; a rank calls
               it for its own shard only, and not at all if that is empty
    positions  of the N bank images and the M queries, the same on all ranks; labels (N,), (M,) int64 on the device
    widths     how many of the D columns each space has, in their order

    Each rank keeps its shard of the bank and gathers all queries. The k nearest neighbours of each query in every shard
    are gathered, and the k nearest of those vote. Similarities, and so the neighbours, equal those of a single rank up
    to the last bit, which depends on the shape of the matrix product. Traffic: 4·M·D bytes, and 12·R·k per query.
    If a rank runs out of memory in its extraction, all raise SharedOutOfMemoryError; later, only that rank fails.
    """
    bank, queries = (_extract_shard(extract, side, positions[side], world, batch) for side in (0, 1))
    if world.size == 1:
        options = {"k": k, "temperature": temperature, "num_classes": num_classes, "in_place": True}
        spaces = zip(bank.split(widths, 1), queries.split(widths, 1), strict=True)
        return [knn_accuracy(own, labels[0], q, labels[1], **options) for own, q in spaces]
    bank_counts, query_counts = ([len(s) for s in shard(p, world.size, batch)[0]] for p in positions)
    queries = gather_rows(queries, query_counts, world)
    bank_labels = labels[0].split(bank_counts)[world.rank]
    k = min(k, len(positions[0]))
    chunk = max(1, _CHUNK_BYTES // (4 * max(1, len(bank)) + 12 * world.size * k))
    percents = []
    for own, own_queries in zip(bank.split(widths, 1), queries.split(widths, 1), strict=True):
        F.normalize(own, dim=1, out=own)
        correct = labels[1].new_zeros(())
        for chunk_queries, chunk_labels in zip(own_queries.split(chunk), labels[1].split(chunk), strict=True):
            values, classes = _neighbours(own, bank_labels, chunk_queries, k, world)
            correct += (count_votes(values, classes, temperature, num_classes).argmax(1) == chunk_labels).sum()
        percents.append(100 * int(correct) / len(queries))
    return percents


def _extract_shard(
    extract: Callable[[int, np.ndarray, int], Tensor], side: int, positions: np.ndarray, world: World, batch: int
) -> Tensor:
    """Features of this rank's shard; (0, D) if it is empty. If one of several ranks lacks the memory, all raise
    SharedOutOfMemoryError."""
    shards, batch = shard(positions, world.size, batch)
    own = shards[world.rank]
    if world.size == 1:
        return extract(side, own, batch)
    features, dim = None, 0
    try:
        features = extract(side, own, batch) if len(own) else None
        dim = 0 if features is None else features.shape[1]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        dim = _NO_MEMORY
    dims = world.all_gather(torch.tensor([dim], device=world.device)).wait().tolist()
    if _NO_MEMORY in dims:
        raise SharedOutOfMemoryError(f"rank {dims.index(_NO_MEMORY)} ran out of memory")
    return torch.zeros((0, max(dims)), device=world.device) if features is None else features


def _neighbours(bank: Tensor, labels: Tensor, queries: Tensor, k: int, world: World) -> tuple[Tensor, Tensor]:
    """Similarities and classes of the k nearest neighbours over the shards of all ranks, (m, k) each."""
    values = queries.new_full((len(queries), k), -torch.inf)
    classes = labels.new_zeros((len(queries), k))
    if len(bank):
        similarity, rows = top_k_neighbours(bank, queries, k)
        values[:, : similarity.shape[1]], classes[:, : similarity.shape[1]] = similarity, labels[rows]
    pending = [world.all_gather(local) for local in (values, classes)]
    values, classes = (torch.cat(gathered.wait().split(len(queries)), dim=1) for gathered in pending)
    values, columns = values.topk(k, dim=1)
    return values, classes.gather(1, columns)
