"""Bank and query split of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
