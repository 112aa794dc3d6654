"""Bank and query split of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastmoco.errors import DeviceError
from fastmoco.evaluation.budget import gibibytes, rows_that_fit
from pipelines.data.index import Dataset, ImageIndex
from pipelines.randomness import Domain, permutation

HELD_OUT = 10  # without a labelled test split, one image in ten is a query


@dataclass(frozen=True, eq=False)
class Subset:
    """The images of an index at `positions`."""

    index: ImageIndex
    positions: np.ndarray

    @classmethod
    def all_of(cls, index: ImageIndex) -> Subset:
        """All images of an index."""
        return cls(index, np.arange(len(index)))

    def __len__(self) -> int:
        return len(self.positions)

    def labels(self) -> np.ndarray:
        """(len(self),) int64; the index must have labels."""
        assert self.index.labels is not None
        return self.index.labels[self.positions]

    def labels_on(self, device: torch.device) -> Tensor:
        """The labels as a tensor on a device."""
        return torch.from_numpy(self.labels()).to(device)


def stratified(labels: np.ndarray, rows: int) -> np.ndarray:
    """Sorted positions of about `rows` of N labels (N,) int64: of each class its share, but at least one.

    A pure function of (labels, rows); a smaller sample is part of a larger one.
    """
    count = len(labels)
    order = permutation(0, Domain.SUBSET, count)
    by_class = order[np.argsort(labels[order], kind="stable")]
    members = np.bincount(labels)
    number = np.arange(count) - np.repeat(np.cumsum(members) - members, members)  # of an image within its class
    kept = number < np.repeat(np.maximum(1, members * rows // count), members)
    return np.sort(by_class[kept])


def subsample(subset: Subset, rows: int) -> Subset:
    """A `stratified` sample of about `rows` images of a subset, in its order; of equal chances without labels."""
    if rows >= len(subset):
        return subset
    labels = np.zeros(len(subset), dtype=np.int64) if subset.index.labels is None else subset.labels()
    return Subset(subset.index, subset.positions[stratified(labels, rows)])


@dataclass(frozen=True, eq=False)
class EvaluationSplit:
    """Probes are fitted on the bank and measured on the queries. Without labels, both are the same images.

    class_names  of the labels; empty without labels
    description  text that names the images
    unlabelled   reason why there are no usable labels; empty if there are
    """

    bank: Subset
    queries: Subset
    class_names: tuple[str, ...]
    description: str
    unlabelled: str = ""


def bank_and_queries(dataset: Dataset) -> tuple[Subset, Subset] | None:
    """Labelled training split and labelled test split; without the latter, a random tenth of the former is held out.

    None without labels, or with fewer than 10 images to split.
    """
    bank, test = dataset.bank, dataset.test
    if bank is None or bank.labels is None:
        return None
    if test is not None and test.labels is not None:
        return Subset.all_of(bank), Subset.all_of(test)
    if len(bank) < HELD_OUT:
        return None
    # At random, since labels may be periodic: every tenth image could be of one class.
    held_out, remaining = np.split(permutation(0, Domain.SUBSET, len(bank)), [len(bank) // HELD_OUT])
    return Subset(bank, np.sort(remaining)), Subset(bank, np.sort(held_out))


def split_dataset(dataset: Dataset) -> EvaluationSplit:
    """The split of `bank_and_queries` if it has two classes and 10 images in the bank; otherwise one without labels."""
    pair = bank_and_queries(dataset)
    if pair is None or len(pair[0].index.class_names) < 2 or len(pair[0].index) < HELD_OUT:
        return _unlabelled(dataset.bank, dataset.train if dataset.test is None else dataset.test)
    bank, queries = pair
    if queries.index is dataset.test:
        description = f"{len(queries):,} images of {queries.index.name}, against {len(bank):,} of {bank.index.name}"
    else:
        description = f"{len(queries):,} images held out of {bank.index.name}, against the other {len(bank):,}"
    return EvaluationSplit(bank, queries, bank.index.class_names, description)


def fit_to_budget(split: EvaluationSplit, feature_dim: int, budget: int) -> EvaluationSplit:
    """The split, or if its features exceed `budget` bytes on the device, one with fewer images, which it describes.

    Raises DeviceError if too few would be left.
    """
    bank, queries, classes = split.bank, split.queries, len(split.class_names)
    shared = bank is queries
    # Features of an index, those of a part of it, and the normalised bank of kNN; of the queries also their scores.
    copies = 1 + (len(bank) < len(bank.index))
    row_bytes = (4 * feature_dim * (copies + 1), 0 if shared else 4 * feature_dim * copies + 12 * classes)
    rows = rows_that_fit(len(bank), len(queries), row_bytes, budget, max(HELD_OUT, classes))
    needed = f"{gibibytes(len(bank) * row_bytes[0] + len(queries) * row_bytes[1])} of features"
    if rows is None:
        raise DeviceError(
            f"{needed} exceed the {gibibytes(budget)} for them, half of the free memory, by too much to sample the "
            f"images: free some, or use --device cpu"
        )
    if rows == (len(bank), len(queries)):
        return split
    bank, queries = _alone(subsample(bank, rows[0])), _alone(subsample(queries, rows[1]))
    used = f"{len(bank):,} and {len(queries):,} of these, since {needed} exceed the {gibibytes(budget)} for them"
    return replace(split, bank=bank, queries=bank if shared else queries, description=f"{split.description}; {used}")


def _alone(subset: Subset) -> Subset:
    """The same images as a whole index, since the features of an index are extracted together."""
    whole = len(subset) == len(subset.index)
    return subset if whole else Subset.all_of(subset.index.select(subset.positions))


def _unlabelled(bank: ImageIndex | None, images: ImageIndex) -> EvaluationSplit:
    if bank is None or bank.labels is None:
        reason = f"{images.name} has no labels"
    elif len(bank.class_names) < 2:
        reason = f"all images of {bank.name} are of one class"
    else:
        reason = f"{bank.name} has {len(bank):,} images, too few to split"
    everything = Subset.all_of(images)
    return EvaluationSplit(
        everything, everything, (), f"{len(images):,} images of {images.name}, without labels", reason
    )
