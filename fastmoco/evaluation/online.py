"""Is it learning? kNN where there are labels; alignment, uniformity and effective rank where there are none."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmoco.config import ResolvedConfig
from fastmoco.distributed.world import World
from fastmoco.evaluation.features import TunedSource, extract
from fastmoco.evaluation.geometry import alignment, effective_rank, uniformity
from fastmoco.evaluation.knn_distributed import knn_accuracy_of_ranks
from fastmoco.model.encoder import Encoder
from fastmoco.run.thread_count import tunes_threads, with_fastest_threads
from pipelines.augment.presets import Augmentation
from pipelines.backends.select import Pipeline, open_source
from pipelines.data.index import Dataset, ImageIndex
from pipelines.randomness import Domain, permutation
from pipelines.views import CropSource

HELD_OUT = 10  # without a test split, one image in ten asks and the others answer
PAIRS = 1024  # images whose two views measure alignment


class OnlineEvaluator:
    """Evaluates an encoder during training, always on the same images, without touching its state.

    Each rank embeds its share of the images, and all come to the same numbers, which are those of one rank.
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
        self._sets: tuple[_Set, _Set] | None = None
        bank, test = dataset.bank, dataset.test
        if bank is not None and bank.labels is not None:

            def source_of(index: ImageIndex) -> CropSource:
                source = train_source
                if index is not dataset.train:
                    source = open_source(config.data.pipeline, index, self._side, device, config.data.workers)
                return TunedSource(source, with_fastest_threads) if tunes_threads(config, world) else source

            everything = np.arange(len(bank))
            if test is not None and test.labels is not None:
                self._sets = (
                    _Set(bank, source_of(bank), everything),
                    _Set(test, source_of(test), np.arange(len(test))),
                )
            elif len(bank) >= HELD_OUT:
                # Drawn, because in a list the classes may take turns: every tenth image could be of one class.
                drawn, source = permutation(0, Domain.SUBSET, len(bank)), source_of(bank)
                queries, bank_positions = np.split(drawn, [len(bank) // HELD_OUT])
                self._sets = (_Set(bank, source, np.sort(bank_positions)), _Set(bank, source, np.sort(queries)))

    @property
    def has_labels(self) -> bool:
        return self._sets is not None

    def pixels(self) -> float | None:
        """kNN top-1 accuracy of the raw, normalised pixels in percent: what an encoder has to beat."""
        return None if self._sets is None else self._knn(lambda images: images.flatten(1))

    def evaluate(self, encoder: Encoder) -> dict[str, float]:
        """Named numbers: knn_top1_percent, or alignment, uniformity and effective_rank."""
        was_training = encoder.training
        encoder.eval()
        try:
            if self._sets is not None:
                return {"knn_top1_percent": self._knn(lambda images: self._autocast(encoder.features, images))}
            return self._without_labels(encoder)
        finally:
            encoder.train(was_training)

    def _autocast(self, function, images: Tensor) -> Tensor:
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            return function(images)

    def _knn(self, function) -> float:
        assert self._sets is not None
        (bank, queries), a = self._sets, self._augmentation

        def features(side: int, positions: np.ndarray, batch: int) -> Tensor:
            part = (bank, queries)[side]
            return extract(function, part.source, part.index, positions, self._side, a.mean, a.std, batch)

        return knn_accuracy_of_ranks(
            features,
            (bank.positions, queries.positions),
            (bank.labels.to(self._device), queries.labels.to(self._device)),
            self._world,
            k=self._config.run.knn_k,
            temperature=self._config.run.knn_t,
            num_classes=len(bank.index.class_names),
        )

    @torch.inference_mode()
    def _without_labels(self, encoder: Encoder) -> dict[str, float]:
        """Over the views of the first steps' images, so that every evaluation sees the same pairs."""
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


class _Set:
    """Labelled images, and where their crops come from."""

    def __init__(self, index: ImageIndex, source: CropSource, positions: np.ndarray) -> None:
        assert index.labels is not None
        self.index, self.source, self.positions = index, source, positions
        self.labels = torch.from_numpy(index.labels[positions])
