"""The features of every image of a data set, with paths and labels: `fastmoco embed`, and the same from Python.

N images · D length of a feature
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastmoco.backbones.read import LoadedBackbone, read_backbone
from fastmoco.device import pick_device
from fastmoco.errors import ConfigError
from fastmoco.evaluation.as_trained import decoded_as_trained
from fastmoco.evaluation.budget import budget_bytes
from fastmoco.evaluation.embed_options import EmbedOptions
from fastmoco.evaluation.extractor import Extractor
from fastmoco.run.loading import load_reported
from fastmoco.run.stuck_reads import ended_by_stuck_reads
from fastmoco.run.thread_count import threads_restored
from pipelines.data.dataset import Dataset
from pipelines.data.index import ImageIndex

_ROWS = 8192  # scaled at a time


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Features of N images.

    features  (N, D) float32, as the backbone gives them or of length 1; a mapped file if they exceed the memory
    paths     of the images: as in the data, absolute for files
    splits    `train` or `test`, for each image
    labels    the name of the class of each image, None for one without
    about     the backbone and the preprocessing: origin, weights_sha256, side, mean, std, normalized
    """

    features: np.ndarray
    paths: list[str]
    splits: list[str]
    labels: list[str | None]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A backbone and the images to embed, opened but not yet read."""

    backbone: LoadedBackbone
    dataset: Dataset
    extractor: Extractor

    @property
    def parts(self) -> dict[str, ImageIndex]:
        """The images by split; those to train on come first."""
        test = self.dataset.test
        return {"train": self.dataset.train} | ({} if test is None else {"test": test})

    @property
    def count(self) -> int:
        """N, the number of images."""
        return sum(map(len, self.parts.values()))


@contextmanager
def embedding(options: EmbedOptions, console: Console) -> Iterator[Prepared]:
    """Open the backbone and the images; warnings are printed. Raises as `embed`, also in the block."""
    with threads_restored(options.cpu_threads), ended_by_stuck_reads():
        device = pick_device(options.device)
        backbone = read_backbone(
            options.backbone, arch=options.arch, stem=options.stem, side=options.crop_size, prefix=options.prefix
        )
        options = decoded_as_trained(options, backbone, options.backbone)
        dataset = load_reported(options, console)
        yield Prepared(backbone, dataset, Extractor(backbone, options, device, console))


def compute(prepared: Prepared, features: np.ndarray, *, normalize: bool) -> Embeddings:
    """Fill features (N, D) float32, in memory or a mapped file, and describe their images."""
    paths, splits, labels, begin = [], [], [], 0
    for split, index in prepared.parts.items():
        part = features[begin : begin + len(index)]
        prepared.extractor.fill(index, torch.from_numpy(part))
        paths += [index.path(i) for i in range(len(index))]
        splits += [split] * len(index)
        labels += _labels(index, prepared.dataset.bank)
        begin += len(index)
    if normalize:
        for row in range(0, len(features), _ROWS):
            rows = features[row : row + _ROWS]
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    backbone = prepared.backbone
    about = {name: getattr(backbone, name) for name in ("origin", "arch", "width", "stem", "side", "mean", "std")}
    about |= {"weights_sha256": prepared.extractor.weights_hash, "normalized": normalize}
    return Embeddings(features, paths, splits, labels, about)


@contextmanager
def room_for(count: int, dim: int, folder: Path) -> Iterator[np.ndarray]:
    """A new array (count, dim) float32: in memory if it fits in a quarter of what is free, else a file without a name
    in a folder, which the system deletes. Raises OSError."""
    size = 4 * count * dim
    if 2 * size <= budget_bytes(torch.device("cpu")):
        yield np.empty((count, dim), dtype=np.float32)
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        yield np.memmap(file, dtype=np.float32, mode="r+", shape=(count, dim))


def _labels(index: ImageIndex, bank: ImageIndex | None) -> list[str | None]:
    """The class of each image; of a partly labelled data set, whose labelled images are the bank, by path."""
    if index.labels is not None:
        return [index.class_names[label] for label in index.labels.tolist()]
    known: dict[str, str] = {}
    if bank is not None and bank.labels is not None and index.pixels is None:
        known = {bank.path(i): bank.class_names[label] for i, label in enumerate(bank.labels.tolist())}
    return [known.get(index.path(i)) for i in range(len(index))]


def check_count(prepared: Prepared, options: EmbedOptions) -> None:
    """Raise ConfigError if there are no other images to compare with."""
    if prepared.count < 2 and (options.neighbours or options.duplicates):
        raise ConfigError("--neighbours and --duplicates need 2 images or more, and there is 1")
