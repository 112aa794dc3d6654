"""Evaluation during training: alignment, uniformity and effective rank; with labels also kNN accuracy.

Features of the bank and the queries are held on the device. If they exceed its budget (`budget.py`), the evaluation
uses fewer images or is left out, and says so; training goes on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fastmoco.config import ResolvedConfig
from fastmoco.config.choices import KnnSpace
from fastmoco.console import say
from fastmoco.device import describe
from fastmoco.distributed.world import World
from fastmoco.errors import DeviceError, DivergedError
from fastmoco.evaluation.budget import (
    SharedOutOfMemoryError,
    gibibytes,
    is_out_of_memory,
    release_cached_memory,
    rows_that_fit,
    shared_budget_bytes,
)
from fastmoco.evaluation.features import BATCH, TunedSource, extract
from fastmoco.evaluation.geometry import alignment, effective_rank, uniformity
from fastmoco.evaluation.knn_distributed import distributed_knn_accuracy
from fastmoco.evaluation.splits import Subset, bank_and_queries, subsample
from fastmoco.model.encoder import Encoder
from fastmoco.run.thread_count import tunes_threads, with_fastest_threads
from pipelines.augment.presets import Augmentation
from pipelines.backends.select import Pipeline, open_source
from pipelines.data.index import Dataset, ImageIndex
from pipelines.views import CropSource

# Images whose two views are compared; with labels kNN is the finer measure, and collapse shows in a few as well.
PAIRS, PAIRS_WITH_LABELS = 1024, 256
# Sides of views whose pixels are compared as they are. Larger views are averaged to 32 pixels, which classify about as
# well (Chrabaszcz et al. 2017, a downsampled variant of ImageNet), and are no larger than the features of a ResNet-50.
MAX_PIXEL_SIDE, AVERAGED_SIDE = 64, 32
RETRIES = 3  # of an evaluation that has run out of memory, each holding half as much and in batches half as large
_MIN_BATCH = 16


@dataclass(frozen=True)
class _Sample:
    """The images of a kNN evaluation, the rows asked for, and the bytes that their features take on this rank."""

    bank: Subset
    queries: Subset
    rows: tuple[int, int]
    batch: int
    held_bytes: int


class OnlineEvaluator:
    """Evaluates an encoder during training, always on the same images, without changing its state.

    Each rank embeds a shard of the images; all return the same metrics, equal to those of a single rank.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        dataset: Dataset,
        train_source: CropSource,
        pipeline: Pipeline,
        augmentation: Augmentation,
        world: World,
        dtype: torch.dtype,
        console: Console | None = None,
    ) -> None:
        device = world.device
        self._config, self._pipeline, self._augmentation = config, pipeline, augmentation
        self._world, self._device, self._dtype = world, device, dtype
        self._side, self._console = config.augment.crop_size, console or Console(quiet=True)
        self._samples: dict[str, _Sample] = {}  # by name of the evaluation: those of the last one
        self._subsets = bank_and_queries(dataset)
        if self._subsets is not None:
            bank, queries = (subset.index for subset in self._subsets)
            bank_source = self._source_of(bank, dataset, train_source)
            query_source = bank_source if queries is bank else self._source_of(queries, dataset, train_source)
            self._sources = (bank_source, query_source)

    @property
    def has_labels(self) -> bool:
        return self._subsets is not None

    def pixels(self) -> float | None:
        """kNN top-1 accuracy of the normalised pixels in percent, a baseline; None without labels or memory.

        Views of more than 64 pixels are averaged to 32.
        """
        if self._subsets is None:
            return None
        side = self._side if self._side <= MAX_PIXEL_SIDE else AVERAGED_SIDE
        if side < self._side:
            say(self._console, f"kNN of raw pixels: the views of {self._side} pixels are averaged to {side}")

        def pixels(images: Tensor) -> Tensor:
            images = images if side == self._side else F.interpolate(images, size=(side, side), mode="area")
            return images.flatten(1)

        accuracy = self._knn("kNN of raw pixels", pixels, (len(self._augmentation.mean) * side * side,))
        return None if accuracy is None else accuracy[0]

    def evaluate(self, encoder: Encoder) -> dict[str, float]:
        """Metrics by name: alignment, uniformity and effective_rank; with labels also kNN accuracies.

        knn_top1_percent is of the backbone's features, knn_output_top1_percent of the encoder's output. Those that
        memory does not suffice for are left out. With a bank that is smaller than that of the data set, also
        knn_bank_images.
        """
        was_training = encoder.training
        encoder.eval()
        try:
            if self._subsets is None:
                return self._spread(encoder)
            function, widths = _spaces(encoder, self._config.run.knn_on)
            percents = self._knn("kNN", lambda images: self._autocast(function, images), tuple(widths.values()))
            if percents is None:
                return self._spread(encoder)
            used, all_images = len(self._samples["kNN"].bank), len(self._subsets[0])
            bank = {"knn_bank_images": used} if used < all_images else {}
            return dict(zip(widths, percents, strict=True)) | bank | self._spread(encoder)
        finally:
            encoder.train(was_training)

    def _source_of(self, index: ImageIndex, dataset: Dataset, train_source: CropSource) -> CropSource:
        source, data = train_source, self._config.data
        if index is not dataset.train:
            source = open_source(data.pipeline, index, self._side, self._device, data.workers)
        return TunedSource(source, with_fastest_threads) if tunes_threads(self._config, self._world) else source

    def _autocast(self, function, images: Tensor) -> Tensor:
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            return function(images)

    def _knn(self, name: str, function, widths: tuple[int, ...]) -> list[float] | None:
        """kNN accuracy of each of the spaces that the outputs (B, sum of widths) of a function have, side by side;
        None if it is left out for want of memory."""
        failed = False
        for _ in range(1 + RETRIES):
            sample = self._sample(name, sum(widths), failed)
            if sample is None:
                return None
            try:
                return self._accuracy(function, sample, widths)
            except (RuntimeError, MemoryError) as error:
                self._raise_unless_out_of_memory(name, error)
                failed = True
            finally:
                release_cached_memory(self._device)
        say(self._console, f"{name} is left out: it has run out of memory on {describe(self._device)}", "yellow")
        return None

    def _sample(self, name: str, dim: int, failed: bool) -> _Sample | None:
        """The images of the last evaluation of this name, or fewer if memory has become scarce; None if too few fit.

        failed  whether that evaluation has run out of memory
        """
        assert self._subsets is not None
        (bank, queries), ranks, budget = self._subsets, self._world.size, shared_budget_bytes(self._world)
        last = self._samples.get(name, _Sample(bank, queries, (len(bank), len(queries)), BATCH, 0))
        batch = max(_MIN_BATCH, last.batch // 2) if failed else last.batch
        budget = min(budget, last.held_bytes // 2) if failed else budget
        # A rank holds its shard of the bank, and all queries: gathered from padded shards, three times.
        row_bytes = (-(-4 * dim // ranks), 4 * dim * (1 if ranks == 1 else 3))
        least = max(self._config.run.knn_k, len(bank.index.class_names))
        rows = rows_that_fit(*last.rows, row_bytes, budget, least)
        needed = len(bank) * row_bytes[0] + len(queries) * row_bytes[1]
        reason = (
            f"{gibibytes(needed)} of features of all images exceed the {gibibytes(budget)} for them on {self._device}"
        )
        if failed:
            reason = f"it has run out of memory on {describe(self._device)}"
        if rows is None:
            say(self._console, f"{name} is left out: {reason}", "yellow")
            return None
        held = rows[0] * row_bytes[0] + rows[1] * row_bytes[1]
        sample = _Sample(subsample(bank, rows[0]), subsample(queries, rows[1]), rows, batch, held)
        if failed or rows != last.rows:
            used = f"{len(sample.bank):,} of {len(bank):,} images in the bank, {len(sample.queries):,} queries"
            say(self._console, f"{name}: {used}, since {reason}", "yellow")
        self._samples[name] = sample
        return sample

    def _accuracy(self, function, sample: _Sample, widths: tuple[int, ...]) -> list[float]:
        subsets, a = (sample.bank, sample.queries), self._augmentation

        def features(side: int, positions: np.ndarray, batch: int) -> Tensor:
            index, source = subsets[side].index, self._sources[side]
            return _finite(extract(function, source, index, positions, self._side, a.mean, a.std, batch))

        return distributed_knn_accuracy(
            features,
            (sample.bank.positions, sample.queries.positions),
            (sample.bank.labels_on(self._device), sample.queries.labels_on(self._device)),
            self._world,
            k=self._config.run.knn_k,
            temperature=self._config.run.knn_t,
            num_classes=len(sample.bank.index.class_names),
            widths=widths,
            batch=sample.batch,
        )

    def _raise_unless_out_of_memory(self, name: str, error: BaseException) -> None:
        """Re-raise other errors, and DeviceError for one of this rank alone, for which the others would wait."""
        if not is_out_of_memory(error):
            raise error
        if self._world.size > 1 and not isinstance(error, SharedOutOfMemoryError):
            raise DeviceError(
                f"{name} has run out of memory on {describe(self._device)}: resume with --resume and --knn-every 0, "
                f"or with more memory"
            ) from error

    def _spread(self, encoder: Encoder) -> dict[str, float]:
        """Alignment, uniformity and effective rank; none without the memory."""
        generator = random.getstate()  # the pipeline `dataloader` draws from Python's and torch's global generators
        try:
            with torch.random.fork_rng(devices=[]):
                return self._geometry(encoder)
        except (RuntimeError, MemoryError) as error:
            self._raise_unless_out_of_memory("the evaluation", error)
        finally:
            random.setstate(generator)
            release_cached_memory(self._device)
        reason = f"it has run out of memory on {describe(self._device)}"
        say(self._console, f"alignment, uniformity and effective rank are left out: {reason}", "yellow")
        return {}

    @torch.inference_mode()
    def _geometry(self, encoder: Encoder) -> dict[str, float]:
        """Metrics of the views of the first steps, so that every evaluation sees the same pairs."""
        batch = self._pipeline.planner.batch_size
        queries, keys = [], []
        pairs = PAIRS_WITH_LABELS if self.has_labels else PAIRS
        for views in self._pipeline.views(0, max(1, pairs // batch)):
            q, k = (self._autocast(encoder, images).float() for images in (views.query, views.key))
            queries.append(self._world.all_gather(q).wait())
            keys.append(self._world.all_gather(k).wait()[views.key_order.argsort()])
        q, k = _finite(torch.cat(queries)), _finite(torch.cat(keys))
        return {
            "alignment": alignment(q, k),
            "uniformity": uniformity(q),
            "effective_rank": effective_rank(q - q.mean(0)),
        }


def _spaces(encoder: Encoder, knn_on: KnnSpace) -> tuple[Callable[[Tensor], Tensor], dict[str, int]]:
    """A function of images (B, 3, S, S) to what neighbours are found in, and its width by the metric's name."""
    if knn_on == "features":
        return encoder.features, {"knn_top1_percent": encoder.feature_dim}
    if knn_on == "output":
        return encoder, {"knn_output_top1_percent": encoder.dim}

    def both(images: Tensor) -> Tensor:
        features = encoder.features(images)
        return torch.cat([features.float(), encoder.head(features).float()], dim=1)

    return both, {"knn_top1_percent": encoder.feature_dim, "knn_output_top1_percent": encoder.dim}


def _finite(features: Tensor) -> Tensor:
    """The same features (B, C). Raises DivergedError if they are not finite, as of weights that are too large."""
    if not features.isfinite().all():
        raise DivergedError(
            "the features of the evaluation are not finite, though the weights are: lower --lr, or use --amp fp32"
        )
    return features
