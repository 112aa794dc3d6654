"""An evaluation: one backbone, one data set, and the probes between them.

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

from fastmoco.device import DTYPES
from fastmoco.errors import ConfigError
from fastmoco.evaluation.collapse import LabelFree, judge
from fastmoco.evaluation.confusion import Accuracy, measure
from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.few_label import C, FewLabels, draw_labelled, few_label
from fastmoco.evaluation.fine_tune import fine_tune
from fastmoco.evaluation.knn import knn_votes
from fastmoco.evaluation.labelled_views import ViewKind
from fastmoco.evaluation.linear import cached_batches, fit_linear
from fastmoco.evaluation.logistic import choose_c, fit_logistic
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.splits import Sets
from pipelines.errors import DataError
from pipelines.randomness import Domain, permutation

K = 200  # neighbours that vote, as in the authors' demo
LABEL_FREE_IMAGES = 4_096  # enough for the rank of 2,048 features
PAIRS = 1_024  # images whose two views are compared


@dataclass(frozen=True)
class Result:
    """What a probe found, with its settings in words and in numbers."""

    probe: str
    words: str
    settings: dict[str, Any]
    found: Accuracy | FewLabels
    seconds: float


class Evaluation:
    """The probes that were asked for. What cannot work is refused before an image is read.

    Raises DataError for missing labels and for classes with too few images, ConfigError for too few neighbours.
    """

    def __init__(self, sets: Sets, extractor: Extractor, options: EvalOptions) -> None:
        self.sets, self.extractor, self.options = sets, extractor, options
        self.device, self.classes = extractor.device, len(sets.class_names)
        self.probes: tuple[str, ...] = (
            options.asked_probes if options.probes or options.labels or sets.class_names else ()
        )
        if self.probes:
            self._check()

    @property
    def k(self) -> int:
        return self.options.knn_k or min(K, len(self.sets.bank))

    @cached_property
    def draws(self) -> list[list[np.ndarray]]:
        """Rows of the bank whose labels the few-label probe uses: of every amount, one for each seed."""
        labels, names, options = self.sets.bank.labels(), self.sets.class_names, self.options
        seeds = [(options.seed + number) % 2**32 for number in range(options.label_seeds)]
        return [[draw_labelled(labels, amount, names, seed) for seed in seeds] for amount in options.amounts]

    def _check(self) -> None:
        sets = self.sets
        if sets.unlabelled:
            raise DataError(
                f"{sets.unlabelled}, and the {self.probes[0]} probe needs labelled images of two classes: give a "
                f"folder of class folders with --data, or leave --probes out"
            )
        if len(np.unique(sets.bank.labels())) < 2:
            raise DataError(f"all {len(sets.bank):,} images to learn from are of one class: use more images")
        if "knn" in self.probes and self.k > len(sets.bank):
            raise ConfigError(
                f"--knn-k is {self.k}, and the bank has {len(sets.bank):,} images: use {len(sets.bank)} or fewer"
            )
        if "few-label" in self.probes:
            _ = self.draws

    def run(self) -> Iterator[Result]:
        """The probes in turn. Raises ConfigError, DataError and CheckpointError."""
        probes: dict[str, Callable[[], Iterator[Result]]] = {
            "knn": self._knn,
            "linear": self._linear,
            "logistic": self._logistic,
            "few-label": self._few_label,
            "fine-tune": self._fine_tune,
        }
        for probe in self.probes:
            yield from probes[probe]()

    def label_free(self) -> LabelFree:
        """What features tell without labels, of up to 4,096 of the images that ask; DataError for a single image."""
        queries = self.sets.queries
        if len(queries) < 2:
            raise DataError(f"there is {len(queries)} image to evaluate on, expected 2 or more: give another --data")
        drawn = permutation(0, Domain.SUBSET, len(queries))
        rows = torch.from_numpy(np.sort(drawn[:LABEL_FREE_IMAGES])).to(self.device)
        features = self.extractor.features(queries)[rows]
        query, key = self.extractor.pairs(queries.index, queries.positions[np.sort(drawn[:PAIRS])])
        return judge(features.cpu(), query.cpu(), key.cpu(), self.classes or None)

    # ---- probes ------------------------------------------------------------------------------------------------------

    def _knn(self) -> Iterator[Result]:
        features, labels, asked = self._given()
        began, t = time.monotonic(), self.options.knn_t
        votes = knn_votes(features, labels, asked, k=self.k, temperature=t, num_classes=self.classes)
        found = self._accuracy(votes.where(votes > 0, -torch.inf))
        yield _result("knn", f"{self.k} neighbours, T {t:g}", {"k": self.k, "temperature": t}, found, began)

    def _linear(self) -> Iterator[Result]:
        features, labels, asked = self._given()
        began, sgd, kind = time.monotonic(), self.options.linear_sgd, self.options.linear_views
        if kind == "center":
            batches, steps_per_epoch = cached_batches(features, labels, sgd, self.options.seed)
            layer = self._fitted(self.extractor.tuned(batches), steps_per_epoch)
        else:
            with self.extractor.labelled_views(self.sets.bank, kind, sgd.batch_size, drop_last=False) as views:
                batches = ((self.extractor.frozen(images), own) for images, own in views.batches(sgd.epochs))
                layer = self._fitted(batches, views.steps_per_epoch)
        with torch.no_grad():
            found = self._accuracy(layer(asked))
        decay = f", wd {sgd.weight_decay:g}" if sgd.weight_decay else ""
        words = f"SGD, lr {sgd.lr:g} {sgd.schedule}, {sgd.epochs} epochs{decay}, {kind} views"
        yield _result("linear", words, asdict(sgd) | {"views": kind}, found, began)

    def _logistic(self) -> Iterator[Result]:
        features, labels, asked = self._given()
        began, c = time.monotonic(), self.options.logistic_c
        if chosen := c is None:
            c = choose_c(features, labels, self.classes)
        fitted = fit_logistic(features, labels, self.classes, c)
        words = f"scikit-learn, C {c:g}" + (" (chosen on a held-out tenth)" if chosen else "")
        words += "" if fitted.converged else ", not converged"
        settings = {"c": c, "chosen": chosen, "converged": fitted.converged}
        yield _result("logistic", words, settings, self._accuracy(fitted.scores(asked)), began)

    def _few_label(self) -> Iterator[Result]:
        features, labels, asked = self._given()
        asked_labels, c = self.sets.queries.labels_on(self.device), self.options.logistic_c or C
        for amount, draws in zip(self.options.amounts, self.draws, strict=True):
            began = time.monotonic()
            found = few_label(features, labels, asked, asked_labels, draws, amount, self.classes, c)
            times = "1 draw" if len(draws) == 1 else f"{len(draws)} draws"
            words = f"scikit-learn, C {c:g}, {times} of {found.labels:,} labels"
            yield _result("few-label", words, {"labels": amount.text, "c": c}, found, began)

    def _fine_tune(self) -> Iterator[Result]:
        began, options, extractor = time.monotonic(), self.options, self.extractor
        kind: ViewKind = "padded" if extractor.small else "resized"
        sgd = replace(options.fine_tune_sgd, batch_size=min(options.fine_tune_batch_size, len(self.sets.bank)))
        dim = extractor.backbone.feature_dim
        with extractor.labelled_views(self.sets.bank, kind, sgd.batch_size, drop_last=True) as views:
            dtype = DTYPES[options.amp]
            model = fine_tune(extractor.module, dim, self.classes, views, sgd, dtype, self.device, options.seed)
        scores = extractor.through(lambda images: extractor.in_format(model, images), self.sets.queries)
        words = f"SGD, lr {sgd.lr:g} {sgd.schedule}, {sgd.epochs} epochs, {kind} views"
        yield _result("fine-tune", words, asdict(sgd) | {"views": kind}, self._accuracy(scores), began)

    def _given(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features and labels of the bank, features of the queries."""
        sets, features = self.sets, self.extractor.features
        return features(sets.bank), sets.bank.labels_on(self.device), features(sets.queries)

    def _accuracy(self, scores: Tensor) -> Accuracy:
        return measure(scores, self.sets.queries.labels_on(scores.device))

    def _fitted(self, batches: Iterator[tuple[Tensor, Tensor]], steps_per_epoch: int) -> torch.nn.Linear:
        sgd, dim = self.options.linear_sgd, self.extractor.backbone.feature_dim
        return fit_linear(batches, steps_per_epoch, dim, self.classes, sgd, self.device, self.options.seed)


def _result(probe: str, words: str, settings: dict[str, Any], found: Accuracy | FewLabels, began: float) -> Result:
    return Result(probe, words, settings, found, time.monotonic() - began)
