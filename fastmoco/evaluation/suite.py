"""Evaluation of one backbone on one data set by the selected probes.

N images of the bank · M queries · D features · C classes
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmoco.console import counted, say
from fastmoco.device import DTYPES, describe
from fastmoco.errors import ConfigError
from fastmoco.evaluation.budget import budget_bytes, is_out_of_memory, release_cached_memory, rows_that_fit
from fastmoco.evaluation.collapse import LabelFree, judge
from fastmoco.evaluation.confusion import Accuracy, measure
from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.few_label import C, FewLabelAccuracy, draw_labelled, few_label
from fastmoco.evaluation.fine_tune import fine_tune
from fastmoco.evaluation.knn import knn_votes
from fastmoco.evaluation.labelled_views import ViewKind
from fastmoco.evaluation.linear import cached_batches, fit_linear, inputs
from fastmoco.evaluation.logistic import C_CANDIDATES, choose_c, fit_bytes, fit_logistic
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.settings import Sgd
from fastmoco.evaluation.splits import EvaluationSplit, stratified
from fastmoco.progress import Counted
from pipelines.errors import DataError
from pipelines.randomness import Domain, permutation
from pipelines.transfer import to_device

K = 200  # of the kNN classifier, as in the authors' demo
LABEL_FREE_IMAGES = 4_096  # enough to estimate the rank of 2,048 features
PAIRS = 1_024  # images whose two views are compared


@dataclass(frozen=True)
class Result:
    """Accuracy of a probe, with its settings as text and as values."""

    probe: str
    description: str
    settings: dict[str, Any]
    accuracy: Accuracy | FewLabelAccuracy
    seconds: float


class Evaluation:
    """The selected probes. Invalid requests are rejected before an image is read.

    Raises DataError for missing labels and for classes with too few images, ConfigError for a k larger than the bank.
    """

    def __init__(self, split: EvaluationSplit, extractor: Extractor, options: EvalOptions) -> None:
        self.split, self.extractor, self.options = split, extractor, options
        self.device, self.classes = extractor.device, len(split.class_names)
        self.probes: tuple[str, ...] = (
            options.selected_probes if options.probes or options.labels or split.class_names else ()
        )
        if self.probes:
            self._check()

    @property
    def k(self) -> int:
        return self.options.knn_k or min(K, len(self.split.bank))

    @property
    def knn_spaces(self) -> tuple[str, ...]:
        """In which spaces kNN finds neighbours: "features", "output", or both where the file has the head."""
        if self.options.knn_on != "both":
            return (self.options.knn_on,)
        return ("features",) if self.extractor.projection is None else ("features", "output")

    @cached_property
    def draws(self) -> list[list[np.ndarray]]:
        """Bank rows whose labels the few-label probe uses: for each amount, one array per seed."""
        labels, names, options = self.split.bank.labels(), self.split.class_names, self.options
        seeds = [(options.seed + number) % 2**32 for number in range(options.label_seeds)]
        return [[draw_labelled(labels, amount, names, seed) for seed in seeds] for amount in options.amounts]

    def _check(self) -> None:
        split = self.split
        if split.unlabelled:
            raise DataError(
                f"{split.unlabelled}, and the {self.probes[0]} probe needs labelled images of two classes: give a "
                f"folder of class folders with --data, or leave --probes out"
            )
        if len(np.unique(split.bank.labels())) < 2:
            raise DataError(f"all {len(split.bank):,} training images are of one class: use more images")
        if "knn" in self.probes and self.k > len(split.bank):
            raise ConfigError(
                f"--knn-k is {self.k}, and the bank has {len(split.bank):,} images: use {len(split.bank)} or fewer"
            )
        if "knn" in self.probes and "output" in self.knn_spaces and self.extractor.projection is None:
            raise ConfigError(
                f"--knn-on output needs the projection head, and {self.extractor.backbone.origin} has none: use "
                "--knn-on features, or a checkpoint of the run"
            )
        if "few-label" in self.probes:
            _ = self.draws  # raises if a class has too few images

    def run(self) -> Iterator[Result]:
        """Run the probes one by one; one that runs out of memory is left out, which is printed.

        Raises ConfigError, DataError, CheckpointError, and DeviceError if the features do not fit.
        """
        probes: dict[str, Callable[[], Iterator[Result]]] = {
            "knn": self._knn,
            "linear": self._linear,
            "logistic": self._logistic,
            "few-label": self._few_label,
            "fine-tune": self._fine_tune,
        }
        for probe in self.probes:
            try:
                yield from probes[probe]()
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            release_cached_memory(self.device)
            self._leave_out(probe, f"it runs out of memory on {describe(self.device)}")

    def label_free(self) -> LabelFree:
        """Diagnose collapse on up to 4,096 of the queries. Raises DataError for fewer than two."""
        queries = self.split.queries
        if len(queries) < 2:
            raise DataError(f"there is {len(queries)} image to evaluate on, expected 2 or more: give another --data")
        drawn = permutation(0, Domain.SUBSET, len(queries))
        rows = torch.from_numpy(np.sort(drawn[:LABEL_FREE_IMAGES])).to(self.device)
        features = self.extractor.features(queries)[rows]
        query, key = self.extractor.view_pairs(queries.index, queries.positions[np.sort(drawn[:PAIRS])])
        return judge(features.cpu(), query.cpu(), key.cpu(), self.classes or None)

    # ---- probes ------------------------------------------------------------------------------------------------------

    def _knn(self) -> Iterator[Result]:
        bank, labels, queries = self._features()
        for name in self.knn_spaces:
            began, t, project = time.monotonic(), self.options.knn_t, self.extractor.project
            sides = (project(bank), project(queries)) if name == "output" else (bank, queries)
            votes = knn_votes(sides[0], labels, sides[1], k=self.k, temperature=t, num_classes=self.classes)
            accuracy = self._accuracy(votes.where(votes > 0, -torch.inf))
            text = f"k {self.k}, T {t:g}, {sides[0].shape[1]:,}-d {name}"
            settings = {"k": self.k, "temperature": t, "on": name}
            yield _result("knn" if name == "features" else "knn-output", text, settings, accuracy, began)

    def _linear(self) -> Iterator[Result]:
        sgd, kind, features = self.options.linear_sgd, self.options.linear_views, self.extractor.features
        queries, bank = features(self.split.queries), features(self.split.bank) if kind == "center" else None
        began = time.monotonic()
        if bank is not None:
            labels = self.split.bank.labels_on(self.device)
            batches, steps_per_epoch = cached_batches(bank, labels, sgd, self.options.seed)
            layer = self._fit_linear(self.extractor.with_tuned_threads(batches), steps_per_epoch)
        else:
            with self.extractor.labelled_views(
                self.split.bank, kind, sgd.batch_size, self.options.seed, drop_last=False
            ) as views:
                batches = ((self.extractor.embed(images), y) for images, y in views.batches(sgd.epochs))
                layer = self._fit_linear(batches, views.steps_per_epoch)
        with torch.no_grad():
            accuracy = self._accuracy(layer(inputs(queries, sgd)))
        decay = f", wd {sgd.weight_decay:g}" if sgd.weight_decay else ""
        momentum = f", momentum {sgd.momentum:g}" if sgd.momentum != Sgd.momentum else ""
        text = f"SGD, lr {sgd.lr:g} {sgd.schedule}{momentum}, {sgd.epochs} epochs{decay}, {kind} views"
        text += ", L2-normalised features" * sgd.normalize
        yield _result("linear", text, asdict(sgd) | {"views": kind}, accuracy, began)

    def _logistic(self) -> Iterator[Result]:
        rows = self._rows_in_host_memory(len(self.split.bank))
        if rows is None:
            self._leave_out("logistic", "the host has too little memory for it")
            return
        bank, labels, queries = self._features()
        began, c = time.monotonic(), self.options.logistic_c
        if rows < len(bank):
            kept = to_device(stratified(self.split.bank.labels(), rows), self.device)
            bank, labels = bank[kept], labels[kept]
        if chosen := c is None:
            with Counted(self.extractor.console, "logistic regression, choice of C", len(C_CANDIDATES), "fits") as fits:
                c = choose_c(bank, labels, self.classes, fits.advance)
        fitted = fit_logistic(bank, labels, self.classes, c)
        text = f"scikit-learn, C {c:g}" + (" (chosen on a held-out tenth)" if chosen else "")
        text += "" if fitted.converged else ", not converged"
        text += f", {len(bank):,} of {len(self.split.bank):,} images for want of memory" * (rows < len(self.split.bank))
        settings = {"c": c, "chosen": chosen, "converged": fitted.converged, "images": len(bank)}
        yield _result("logistic", text, settings, self._accuracy(fitted.scores(queries)), began)

    def _few_label(self) -> Iterator[Result]:
        bank, labels, queries = self._features()
        query_labels, c = self.split.queries.labels_on(self.device), self.options.logistic_c or C
        for amount, draws in zip(self.options.amounts, self.draws, strict=True):
            began = time.monotonic()
            if self._rows_in_host_memory(len(draws[0])) != len(draws[0]):
                self._leave_out(f"few-label {amount.text}", "the host has too little memory for it")
                continue
            with Counted(self.extractor.console, f"few-label probe, {amount.text}", len(draws), "draws") as progress:
                counted = progress.over(draws)
                accuracy = few_label(bank, labels, queries, query_labels, counted, amount, self.classes, c)
            times = "1 draw" if len(draws) == 1 else f"{len(draws)} draws"
            text = f"scikit-learn, C {c:g}, {times} of {accuracy.labels:,} labels"
            yield _result("few-label", text, {"labels": amount.text, "c": c}, accuracy, began)

    def _fine_tune(self) -> Iterator[Result]:
        began, options, extractor = time.monotonic(), self.options, self.extractor
        kind: ViewKind = "padded" if extractor.small else "resized"
        sgd = replace(options.fine_tune_sgd, batch_size=min(options.fine_tune_batch_size, len(self.split.bank)))
        dim = extractor.backbone.feature_dim
        with extractor.labelled_views(self.split.bank, kind, sgd.batch_size, options.seed, drop_last=True) as views:
            dtype = DTYPES[options.amp]
            with Counted(extractor.console, "fine-tuning", views.steps_per_epoch * sgd.epochs, "steps") as progress:
                model = fine_tune(
                    extractor.module, dim, self.classes, views, sgd, dtype, self.device, options.seed, progress.advance
                )
        scores = extractor.apply(lambda images: extractor.autocast(model, images), self.split.queries)
        text = f"SGD, lr {sgd.lr:g} {sgd.schedule}, {counted(sgd.epochs, 'epoch')}, {kind} views"
        yield _result("fine-tune", text, asdict(sgd) | {"views": kind}, self._accuracy(scores), began)

    def _rows_in_host_memory(self, rows: int) -> int | None:
        """As many of these images as logistic regression may hold; None if it would be fewer than the classes."""
        row_bytes = fit_bytes(self.extractor.backbone.feature_dim, self.classes)
        fitting = rows_that_fit(rows, 1, (row_bytes, 0), budget_bytes(torch.device("cpu")), self.classes)
        return None if fitting is None else fitting[0]

    def _leave_out(self, probe: str, reason: str) -> None:
        say(self.extractor.console, f"the {probe} probe is left out: {reason}", "yellow")

    def _features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features and labels of the bank, features of the queries."""
        bank, queries, features = self.split.bank, self.split.queries, self.extractor.features
        return features(bank), bank.labels_on(self.device), features(queries)

    def _accuracy(self, scores: Tensor) -> Accuracy:
        return measure(scores, self.split.queries.labels_on(scores.device))

    def _fit_linear(self, batches: Iterator[tuple[Tensor, Tensor]], steps_per_epoch: int) -> torch.nn.Linear:
        sgd, dim = self.options.linear_sgd, self.extractor.backbone.feature_dim
        with Counted(self.extractor.console, "linear probe", steps_per_epoch * sgd.epochs, "steps") as progress:
            counted = progress.over(batches)
            return fit_linear(counted, steps_per_epoch, dim, self.classes, sgd, self.device, self.options.seed)


def _result(
    probe: str, description: str, settings: dict[str, Any], accuracy: Accuracy | FewLabelAccuracy, began: float
) -> Result:
    return Result(probe, description, settings, accuracy, time.monotonic() - began)
