"""Evaluation during training: kNN accuracy with labels; alignment, uniformity and effective rank without."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmoco.config import ResolvedConfig
from fastmoco.distributed.world import World
from fastmoco.evaluation.features import TunedSource, extract
from fastmoco.evaluation.geometry import alignment, effective_rank, uniformity
from fastmoco.evaluation.knn_distributed import distributed_knn_accuracy
from fastmoco.evaluation.splits import bank_and_queries
from fastmoco.model.encoder import Encoder
from fastmoco.run.thread_count import tunes_threads, with_fastest_threads
from pipelines.augment.presets import Augmentation
from pipelines.backends.select import Pipeline, open_source
from pipelines.data.index import Dataset, ImageIndex
from pipelines.views import CropSource

PAIRS = 1024  # images whose two views are compared


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
    ) -> None:
        device = world.device
        self._config, self._pipeline, self._augmentation = config, pipeline, augmentation
        self._world, self._device, self._dtype = world, device, dtype
        self._side = config.augment.crop_size
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
        """kNN top-1 accuracy of the normalised pixels in percent, a baseline; None without labels."""
        return None if self._subsets is None else self._knn(lambda images: images.flatten(1))

    def evaluate(self, encoder: Encoder) -> dict[str, float]:
        """Metrics by name: knn_top1_percent, or alignment, uniformity and effective_rank."""
        was_training = encoder.training
        encoder.eval()
        try:
            if self._subsets is not None:
                return {"knn_top1_percent": self._knn(lambda images: self._autocast(encoder.features, images))}
            return self._without_labels(encoder)
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

    def _knn(self, function) -> float:
        assert self._subsets is not None
        (bank, queries), a = self._subsets, self._augmentation

        def features(side: int, positions: np.ndarray, batch: int) -> Tensor:
            index, source = (bank, queries)[side].index, self._sources[side]
            return extract(function, source, index, positions, self._side, a.mean, a.std, batch)

        return distributed_knn_accuracy(
            features,
            (bank.positions, queries.positions),
            (bank.labels_on(self._device), queries.labels_on(self._device)),
            self._world,
            k=self._config.run.knn_k,
            temperature=self._config.run.knn_t,
            num_classes=len(bank.index.class_names),
        )

    @torch.inference_mode()
    def _without_labels(self, encoder: Encoder) -> dict[str, float]:
        """Metrics of the views of the first steps, so that every evaluation sees the same pairs."""
        batch = self._pipeline.planner.batch_size
        queries, keys = [], []
        for views in self._pipeline.views(0, max(1, PAIRS // batch)):
            q, k = (self._autocast(encoder, images).float() for images in (views.query, views.key))
            queries.append(self._world.all_gather(q).wait())
            keys.append(self._world.all_gather(k).wait()[views.key_order.argsort()])
        q, k = torch.cat(queries), torch.cat(keys)
        return {
            "alignment": alignment(q, k),
            "uniformity": uniformity(q),
            "effective_rank": effective_rank(q - q.mean(0)),
        }
