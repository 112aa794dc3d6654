"""Who asks and who answers in an evaluation.

N images of the bank · M queries · C classes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmoco.evaluation.online import HELD_OUT
from pipelines.data.index import Dataset, ImageIndex
from pipelines.randomness import Domain, permutation


@dataclass(frozen=True, eq=False)
class Part:
    """Images of an index at `positions`."""

    index: ImageIndex
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def labels(self) -> np.ndarray:
        """(len(self),) int64, where there are any."""
        assert self.index.labels is not None
        return self.index.labels[self.positions]

    def labels_on(self, device: torch.device) -> Tensor:
        return torch.from_numpy(self.labels()).to(device)


@dataclass(frozen=True, eq=False)
class Sets:
    """The bank answers and is fitted on, the queries ask. Without labels both are the same images.

    class_names  of the labels, empty without
    words        which images, for people
    unlabelled   why there are no labels to go by; empty where there are
    """

    bank: Part
    queries: Part
    class_names: tuple[str, ...]
    words: str
    unlabelled: str = ""


def split(dataset: Dataset) -> Sets:
    """The labelled test part asks the labelled training part; without it, a tenth of the latter asks the others.

    The tenth is the one that is held out while training, see `monitor`.
    """
    bank, test = dataset.bank, dataset.test
    if bank is None or bank.labels is None or len(bank.class_names) < 2 or len(bank) < HELD_OUT:
        return _unlabelled(bank, dataset.train if test is None else test)
    if test is not None and test.labels is not None:
        words = f"{len(test):,} images of {test.name}, against {len(bank):,} of {bank.name}"
        return Sets(Part(bank, np.arange(len(bank))), Part(test, np.arange(len(test))), bank.class_names, words)
    asks, answers = np.split(permutation(0, Domain.SUBSET, len(bank)), [len(bank) // HELD_OUT])
    words = f"{len(asks):,} images held out of {bank.name}, against the other {len(answers):,}"
    return Sets(Part(bank, np.sort(answers)), Part(bank, np.sort(asks)), bank.class_names, words)


def _unlabelled(bank: ImageIndex | None, images: ImageIndex) -> Sets:
    everything = Part(images, np.arange(len(images)))
    if bank is None or bank.labels is None:
        reason = f"{images.name} has no labels"
    elif len(bank.class_names) < 2:
        reason = f"all images of {bank.name} are of one class"
    else:
        reason = f"{bank.name} has {len(bank):,} images, too few to learn from and to ask"
    return Sets(everything, everything, (), f"{len(images):,} images of {images.name}, without labels", reason)
