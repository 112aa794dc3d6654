"""Features of a backbone for an evaluation: extracted once, kept on disk, and of pairs of views.

N images · B a batch · D features · S side of a view
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastmoco.console import say
from fastmoco.device import DTYPES
from fastmoco.errors import CheckpointError
from fastmoco.evaluation import cache as feature_cache
from fastmoco.evaluation.features import TunedSource, extract
from fastmoco.evaluation.labelled_views import LabelledViews, ViewKind
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.splits import Part
from fastmoco.export.read import LoadedBackbone
from fastmoco.run.thread_count import with_fastest_threads
from pipelines.augment.presets import CIFAR, V2
from pipelines.backends.select import choose, default_workers, open_pipeline, open_source
from pipelines.data.index import ImageIndex
from pipelines.plan.planner import Planner
from pipelines.views import CropSource

SMALL = 64  # views of up to this many pixels are moved and flipped, and coloured as in the CIFAR demo
WORTH_PROCESSES = 2_000  # images: fewer are read before processes have started, which takes seconds
_PAIR_BATCH = 128

Function = Callable[[Tensor], Tensor]
T = TypeVar("T")


class Extractor:
    """A backbone on a device, and everything that images go through before it."""

    def __init__(self, backbone: LoadedBackbone, options: EvalOptions, device: torch.device, console: Console) -> None:
        self.backbone, self.options, self.device, self.console = backbone, options, device, console
        self.module = backbone.module.to(device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] - torch's stubs lack it
        self.module.requires_grad_(False).eval()
        self._cache = None
        if options.feature_cache:
            self._cache = feature_cache.FeatureCache(Path(options.data_root).expanduser() / "features")
        self._found: dict[int, Tensor] = {}

    @cached_property
    def weights_hash(self) -> str:
        return feature_cache.weights_hash(self.module)

    @property
    def small(self) -> bool:
        return self.backbone.side <= SMALL

    def features(self, part: Part) -> Tensor:
        """(len(part), D) float32 on the device: every image of its index once, or from the disk if they are there.

        Raises DataError for an image that cannot be read, CheckpointError for features that are not finite.
        """
        key = id(part.index)
        if key not in self._found:
            self._found[key] = self._features(part.index).to(self.device)
        found = self._found[key]
        return found if len(part) == len(part.index) else found[torch.from_numpy(part.positions).to(self.device)]

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, D) float32, in the number format that was requested."""
        return self.in_format(self.module, images).float()

    def in_format(self, function: Function, images: Tensor) -> Tensor:
        dtype = DTYPES[self.options.amp]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return function(images)

    def through(self, function: Function, part: Part) -> Tensor:
        """`function` of the centred views of the images of a part, each once: (len(part), ...) float32."""
        return self._extract(function, part.index, part.positions, self._one_pass_pipeline(part.index))

    def pairs(self, index: ImageIndex, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (P, D) of two random views each: those of MoCo v2, or of the CIFAR demo for small views."""
        chosen, b = index.select(positions), self.backbone
        augmentation = replace(CIFAR if self.small else V2, mean=b.mean, std=b.std)
        batch = min(_PAIR_BATCH, len(chosen))
        planner = Planner(chosen.sizes, seed=0, batch_size=batch, augmentation=augmentation, shuffle_keys=False)
        source = open_source("torch", chosen, b.side, self.device, 0)
        pipeline = open_pipeline("torch", chosen, planner, source, b.side, self.device, torch.float32, 0)
        try:
            batches = pipeline.views(0, planner.steps_per_epoch)
            found = [(self.frozen(views.query), self.frozen(views.key)) for views in batches]
        finally:
            pipeline.close()
        query, key = (torch.cat(features) for features in zip(*found, strict=True))
        return query, key

    @contextmanager
    def labelled_views(self, part: Part, kind: ViewKind, batch_size: int, drop_last: bool) -> Iterator[LabelledViews]:
        """New views of every image each pass; the images stay decoded in memory where they fit."""
        b, (pipeline, _) = self.backbone, choose(self.options.pipeline, part.index, self.device)
        source = self._open(pipeline, part.index)
        try:
            yield LabelledViews(
                index=part.index,
                positions=part.positions,
                labels=part.labels(),
                source=source,
                side=b.side,
                mean=b.mean,
                std=b.std,
                kind=kind,
                batch_size=batch_size,
                seed=self.options.seed,
                drop_last=drop_last,
            )
        finally:
            source.close()

    def pixels(self, index: ImageIndex, positions: np.ndarray) -> Tensor:
        """(len(positions), S, S, 3) uint8 on the CPU: the centred views, for pictures."""
        cpu, zero, one = torch.device("cpu"), (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
        source = open_source("torch", index, self.backbone.side, cpu, 0)
        views = extract(lambda images: images, source, index, positions, self.backbone.side, zero, one)
        return views.permute(0, 2, 3, 1).round().to(torch.uint8)

    def _features(self, index: ImageIndex) -> Tensor:
        began, pipeline, b = time.monotonic(), self._one_pass_pipeline(index), self.backbone
        name = ""
        if self._cache is not None:
            how = {"side": b.side, "mean": b.mean, "std": b.std, "arch": b.arch, "stem": b.stem, "width": b.width}
            how |= {"amp": self.options.amp, "pipeline": pipeline, "device": self.device.type}
            name = feature_cache.key(self.weights_hash, feature_cache.images_hash(index), how)
            kept = self._cache.load(name, len(index), b.feature_dim)
            if kept is not None:
                say(self.console, f"features of {index.name}: {len(index):,} images, kept from before")
                return kept
        found = self._extract(self.frozen, index, np.arange(len(index)), pipeline)
        if not found.isfinite().all():
            raise CheckpointError(f"{b.origin} makes features that are not finite: take another, or use --amp fp32")
        seconds = time.monotonic() - began
        rate = f"{len(index) / max(seconds, 1e-9):,.0f} images/s"
        say(self.console, f"features of {index.name}: {len(index):,} images in {seconds:.1f} s, {rate}")
        warning = self._cache.store(name, found) if self._cache is not None else None
        if warning:
            say(self.console, warning, "yellow")
        return found

    def _extract(self, function: Function, index: ImageIndex, positions: np.ndarray, pipeline: str) -> Tensor:
        """With a bar on a terminal."""
        b, source = self.backbone, self._open(pipeline, index)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        try:
            with bar:
                task = bar.add_task("features", total=len(positions))

                def counted(images: Tensor) -> Tensor:
                    found = function(images)
                    bar.advance(task, len(images))
                    return found

                return extract(counted, source, index, positions, b.side, b.mean, b.std)
        finally:
            source.close()

    def _one_pass_pipeline(self, index: ImageIndex) -> str:
        """What reads every image once; not what `choose` takes for many passes, which depends on the free memory."""
        if self.options.pipeline != "auto":
            return self.options.pipeline
        return "resident" if index.pixels is not None else "torch"

    def _open(self, pipeline: str, index: ImageIndex) -> CropSource:
        workers = self.options.workers
        if workers is None:
            workers = 0 if pipeline == "torch" and len(index) < WORTH_PROCESSES else default_workers()
        return TunedSource(open_source(pipeline, index, self.backbone.side, self.device, workers), self.tuned)

    def tuned(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; a CPU works on each with as many threads as are fastest, unless a number was given."""
        fixed = self.device.type != "cpu" or self.options.cpu_threads is not None
        return batches if fixed else with_fastest_threads(batches)
