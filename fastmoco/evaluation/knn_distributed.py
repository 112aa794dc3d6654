"""kNN whose bank and queries lie on several ranks, a part on each, and whose result is that of one.

N images in the bank · M queries · R ranks · D length of a feature · k neighbours
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.distributed.world import World
from fastmoco.evaluation.features import BATCH
from fastmoco.evaluation.knn import count_votes, knn_accuracy, nearest

_CHUNK_BYTES = 256 * 2**20  # for what a chunk of queries meets in the bank of a rank, and what it hears of all ranks


def shares(positions: np.ndarray, ranks: int) -> tuple[list[np.ndarray], int]:
    """A run of positions for every rank, in whole batches of the size returned: so each feature is computed in the same
    company as on one rank, and comes out with the same bits. Of a few images, some ranks get none."""
    batch = min(BATCH, len(positions))
    batches = -(-len(positions) // batch)
    ends = [batches * (rank + 1) // ranks * batch for rank in range(ranks)]
    return np.split(positions, ends[:-1]), batch


def gather_rows(rows: Tensor, counts: list[int], world: World) -> Tensor:
    """All ranks' rows, counts[r] of rank r, one rank behind another: (sum of counts, …)."""
    if world.size == 1:
        return rows
    most = max(counts)
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = world.all_gather(padded).wait().split(most)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@torch.no_grad()
def knn_accuracy_of_ranks(
    extract: Callable[[int, np.ndarray, int], Tensor],
    positions: tuple[np.ndarray, np.ndarray],
    labels: tuple[Tensor, Tensor],
    world: World,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> float:
    """`knn_accuracy` of the features of a bank and of queries.

    extract    (0 for the bank or 1 for the queries, positions, batch) → (n, D) float32 on the device, which each rank
               calls for its share alone, and not at all where that is empty
    positions  of the N and the M images, the same on all ranks; and their labels (N,), (M,) int64 on the device

    A rank keeps its share of the bank. Queries are gathered; of each a rank finds the k nearest in its own share, and
    all then choose among what all have found. The similarities are those of one rank but for what the shape of a
    product does to their last bit, and so is the choice. Traffic: 4·M·D bytes, and 12·R·k for every query.
    """
    bank, queries = (_features(extract, side, positions[side], world) for side in (0, 1))
    if world.size == 1:
        settings = {"k": k, "temperature": temperature, "num_classes": num_classes}
        return knn_accuracy(bank, labels[0], queries, labels[1], **settings)
    of_bank, of_queries = ([len(share) for share in shares(p, world.size)[0]] for p in positions)
    queries = gather_rows(queries, of_queries, world)
    own = labels[0].split(of_bank)[world.rank]
    bank, k = F.normalize(bank, dim=1), min(k, len(positions[0]))
    chunk = max(1, _CHUNK_BYTES // (4 * max(1, len(bank)) + 12 * world.size * k))
    correct = 0
    for part, asked in zip(queries.split(chunk), labels[1].split(chunk), strict=True):
        values, classes = _found(bank, own, part, k, world)
        correct += int((count_votes(values, classes, temperature, num_classes).argmax(1) == asked).sum())
    return 100 * correct / len(queries)


def _features(
    extract: Callable[[int, np.ndarray, int], Tensor], side: int, positions: np.ndarray, world: World
) -> Tensor:
    """Of this rank's share; where it has none, (0, D) all the same."""
    parts, batch = shares(positions, world.size)
    share = parts[world.rank]
    found = extract(side, share, batch) if len(share) else None
    if world.size == 1:
        assert found is not None
        return found
    widths = world.all_gather(torch.tensor([0 if found is None else found.shape[1]], device=world.device)).wait()
    return torch.zeros((0, int(widths.max())), device=world.device) if found is None else found


def _found(bank: Tensor, labels: Tensor, queries: Tensor, k: int, world: World) -> tuple[Tensor, Tensor]:
    """Similarities and classes of the k nearest in the shares of all ranks, (m, k) each."""
    values = queries.new_full((len(queries), k), -torch.inf)
    classes = labels.new_zeros((len(queries), k))
    if len(bank):
        near, which = nearest(bank, queries, k)
        values[:, : near.shape[1]], classes[:, : near.shape[1]] = near, labels[which]
    journeys = [world.all_gather(found) for found in (values, classes)]
    values, classes = (torch.cat(journey.wait().split(len(queries)), dim=1) for journey in journeys)
    values, which = values.topk(k, dim=1)
    return values, classes.gather(1, which)
