"""Features of a backbone for an evaluation: of images, cached on disk, and of pairs of views.

N images · B images per batch · D features · S side of a view
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastmoco.backbones.projection import projection_head
from fastmoco.backbones.read import LoadedBackbone
from fastmoco.console import say
from fastmoco.device import DTYPES, describe
from fastmoco.errors import CheckpointError, DeviceError
from fastmoco.evaluation import cache as feature_cache
from fastmoco.evaluation.budget import budget_bytes, is_out_of_memory, release_cached_memory
from fastmoco.evaluation.extraction_options import ExtractionOptions
from fastmoco.evaluation.features import BATCH, TunedSource, extract
from fastmoco.evaluation.labelled_views import LabelledViews, ViewKind
from fastmoco.evaluation.splits import Subset
from fastmoco.progress import Counted
from fastmoco.run.png import shown_bands
from fastmoco.run.thread_count import with_fastest_threads
from pipelines.augment.presets import CIFAR, V2
from pipelines.backends.select import choose, default_workers, open_pipeline, open_source
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from pipelines.views import CropSource

SMALL_SIDE = 64  # up to this many pixels, views are augmented as on CIFAR: padded crops, colours of the CIFAR demo
MIN_IMAGES_FOR_WORKERS = 2_000  # fewer are read before worker processes have started, which takes seconds
_PAIR_BATCH = 128
_MIN_BATCH = 16  # of an extraction that has run out of memory with larger ones
_CHECKED_ROWS = 65_536  # at a time

Function = Callable[[Tensor], Tensor]
T = TypeVar("T")


class Extractor:
    """A backbone on a device with its preprocessing and its feature cache."""

    def __init__(
        self, backbone: LoadedBackbone, options: ExtractionOptions, device: torch.device, console: Console
    ) -> None:
        self.backbone, self.options, self.device, self.console = backbone, options, device, console
        self.module = backbone.module.to(device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] - torch's stubs lack it
        self.module.requires_grad_(False).eval()
        self.projection = projection_head(backbone.head, backbone.feature_dim)
        """The head of the encoder, on the CPU; None for a backbone without one."""
        self._cache = None
        if options.feature_cache:
            self._cache = feature_cache.FeatureCache(Path(options.data_root).expanduser() / "features")
        self._features_of: dict[int, Tensor] = {}  # by id of the index

    @cached_property
    def weights_hash(self) -> str:
        return feature_cache.weights_hash(self.module)

    @property
    def small(self) -> bool:
        return self.backbone.side <= SMALL_SIDE

    def features(self, subset: Subset) -> Tensor:
        """Features (len(subset), D) float32 on the device. The whole index is extracted once, or read from the cache.

        Raises DataError for an image that cannot be read, CheckpointError for features that are not finite, DeviceError
        without the memory for them.
        """
        index = subset.index
        if id(index) not in self._features_of:
            self._features_of[id(index)] = self._load_or_extract(index)
        features = self._features_of[id(index)]
        return features if len(subset) == len(index) else features[torch.from_numpy(subset.positions).to(self.device)]

    def fill(self, index: ImageIndex, out: Tensor) -> None:
        """Write the features of all images of an index to `out`, (N, D) float32 in host memory or a mapped file.

        Those that fit on the device come from the cache if they are there; others are extracted batch by batch. Raises
        as `features`.
        """
        if 2 * out.numel() * out.element_size() <= budget_bytes(self.device):
            out.copy_(self.features(Subset.all_of(index)))
            return
        began = time.monotonic()
        self._extract(self.embed, index, np.arange(len(index)), self._one_pass_pipeline(index), out)
        self._check_finite(out)
        self._say_extracted(index, began)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """(B, C, S, S) → features (B, D) float32, computed with --amp."""
        return self.autocast(self.module, images).float()

    @torch.no_grad()
    def project(self, features: Tensor) -> Tensor:
        """Features (N, D) → the encoder's output (N, C) float32."""
        assert self.projection is not None
        head = self.projection.to(features.device)
        return torch.cat([head(rows) for rows in features.split(_CHECKED_ROWS)])

    def autocast(self, function: Function, images: Tensor) -> Tensor:
        """`function(images)` under autocast to the dtype of --amp."""
        dtype = DTYPES[self.options.amp]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return function(images)

    def apply(self, function: Function, subset: Subset) -> Tensor:
        """`function` of the centre crops of a subset: (len(subset), ...) float32."""
        return self._extract(function, subset.index, subset.positions, self._one_pass_pipeline(subset.index))

    def view_pairs(self, index: ImageIndex, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (P, D) of two random views per image: augmented as in MoCo v2, or the CIFAR demo for small views."""
        chosen, b = index.select(positions), self.backbone
        augmentation = replace(CIFAR if self.small else V2, mean=b.mean, std=b.std)
        batch = min(_PAIR_BATCH, len(chosen))
        planner = Planner(chosen.sizes, seed=0, batch_size=batch, augmentation=augmentation, shuffle_keys=False)
        source = open_source("torch", chosen, b.side, self.device, 0)
        pipeline = open_pipeline("torch", chosen, planner, source, b.side, self.device, torch.float32, 0)
        try:
            batches = pipeline.views(0, planner.steps_per_epoch)
            pairs = [(self.embed(views.query), self.embed(views.key)) for views in batches]
        finally:
            pipeline.close()
        query, key = (torch.cat(features) for features in zip(*pairs, strict=True))
        return query, key

    @contextmanager
    def labelled_views(
        self, subset: Subset, kind: ViewKind, batch_size: int, seed: int, drop_last: bool
    ) -> Iterator[LabelledViews]:
        """New views of every image in each epoch; decoded images stay in memory if they fit."""
        b, (pipeline, _) = self.backbone, choose(self.options.pipeline, subset.index, self.device)
        source = self._open(pipeline, subset.index)
        try:
            yield LabelledViews(
                index=subset.index,
                positions=subset.positions,
                labels=subset.labels(),
                source=source,
                side=b.side,
                mean=b.mean,
                std=b.std,
                kind=kind,
                batch_size=batch_size,
                seed=seed,
                drop_last=drop_last,
            )
        finally:
            source.close()

    def pixels(self, index: ImageIndex, positions: np.ndarray) -> Tensor:
        """Centre crops (len(positions), S, S, 3) uint8 on the CPU, for pictures: see `shown_bands`."""
        channels = self.backbone.channels
        cpu, zero, one = torch.device("cpu"), (0.0,) * channels, (1 / 255,) * channels
        source = open_source("torch", index, self.backbone.side, cpu, 0)
        views = extract(lambda images: images, source, index, positions, self.backbone.side, zero, one)
        return shown_bands(views).permute(0, 2, 3, 1).round().to(torch.uint8)

    def _load_or_extract(self, index: ImageIndex) -> Tensor:
        began, pipeline, b = time.monotonic(), self._one_pass_pipeline(index), self.backbone
        name = ""
        if self._cache is not None:
            preprocessing = {name: getattr(b, name) for name in ("side", "mean", "std", "arch", "stem", "width")}
            preprocessing |= {"amp": self.options.amp, "pipeline": pipeline, "device": self.device.type}
            name = feature_cache.key(self.weights_hash, feature_cache.images_hash(index), preprocessing)
            cached = self._cache.load(name, len(index), b.feature_dim, self.device)
            if cached is not None:
                say(self.console, f"features of {index.name}: {len(index):,} images, from the cache")
                return cached
        features = self._extract(self.embed, index, np.arange(len(index)), pipeline)
        self._check_finite(features)
        self._say_extracted(index, began)
        warning = self._cache.store(name, features) if self._cache is not None else None
        if warning:
            say(self.console, warning, "yellow")
        return features

    def _check_finite(self, features: Tensor) -> None:
        if not all(part.isfinite().all() for part in features.split(_CHECKED_ROWS)):
            raise CheckpointError(f"the features of {self.backbone.origin} are not finite: use another, or --amp fp32")

    def _say_extracted(self, index: ImageIndex, began: float) -> None:
        seconds = time.monotonic() - began
        rate = f"{len(index) / max(seconds, 1e-9):,.0f} images/s"
        say(self.console, f"features of {index.name}: {len(index):,} images in {seconds:.1f} s, {rate}")

    def _extract(
        self, function: Function, index: ImageIndex, positions: np.ndarray, pipeline: str, out: Tensor | None = None
    ) -> Tensor:
        """Extract, in smaller batches if memory runs out. Raises DeviceError if that does not help."""
        source, batch = self._open(pipeline, index), min(BATCH, len(positions))
        try:
            while True:
                try:
                    return self._extract_in_batches(function, source, index, positions, batch, out)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                if batch <= _MIN_BATCH:
                    raise DeviceError(
                        f"{describe(self.device)} has too little free memory for features of {len(positions):,} "
                        f"images, even in batches of {batch}: free some, or use --limit"
                    )
                batch = max(_MIN_BATCH, batch // 2)
                release_cached_memory(self.device)
                say(self.console, f"out of memory: features are extracted in batches of {batch}", "yellow")
        finally:
            source.close()

    def _extract_in_batches(
        self,
        function: Function,
        source: CropSource,
        index: ImageIndex,
        positions: np.ndarray,
        batch: int,
        out: Tensor | None,
    ) -> Tensor:
        b = self.backbone
        with Counted(self.console, f"features of {index.name}", len(positions)) as progress:

            def counted(images: Tensor) -> Tensor:
                rows = function(images)
                progress.advance(len(images))
                return rows

            return extract(counted, source, index, positions, b.side, b.mean, b.std, batch, out)

    def _one_pass_pipeline(self, index: ImageIndex) -> str:
        """Pipeline for a single pass. Unlike `choose`, it ignores free memory, so that the cache key is stable."""
        if self.options.pipeline != "auto":
            return self.options.pipeline
        return "resident" if index.pixels is not None else "torch"

    def _open(self, pipeline: str, index: ImageIndex) -> CropSource:
        workers = self.options.workers
        if workers is None:
            workers = 0 if pipeline == "torch" and len(index) < MIN_IMAGES_FOR_WORKERS else default_workers()
        return TunedSource(
            open_source(pipeline, index, self.backbone.side, self.device, workers), self.with_tuned_threads
        )

    def with_tuned_threads(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; on a CPU the number of threads is tuned to the fastest, unless --cpu-threads is given."""
        fixed = self.device.type != "cpu" or self.options.cpu_threads is not None
        return batches if fixed else with_fastest_threads(batches)
