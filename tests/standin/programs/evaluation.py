"""Host waits of evaluations with few and with four times as many batches.

python -m tests.standin.run evaluation
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

import numpy as np
import torch

from fastmoco.evaluation import knn
from fastmoco.evaluation.features import extract
from fastmoco.evaluation.labelled_views import LabelledViews, ViewKind
from fastmoco.evaluation.linear import cached_batches
from fastmoco.evaluation.settings import Sgd
from pipelines.data.index import ImageIndex
from pipelines.views import BatchPlan, Crops
from tests.standin import operators, runtime

SIDE, BATCH, FEW, MANY = 16, 32, 4, 16  # batches
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class DeviceSource:
    """Crops that are on the device already."""

    def __init__(self) -> None:
        self.images = torch.zeros((1, BATCH, SIDE, SIDE, 3), dtype=torch.uint8, device="cuda")

    def crops(self, plans: Iterable[BatchPlan]) -> Iterator[Crops]:
        return (Crops(self.images[:, : len(plan.indices)], plan) for plan in plans)

    def close(self) -> None:
        pass


def main() -> None:
    operators.install()
    device, source = torch.device("cuda"), DeviceSource()
    knn._check = lambda *_: None  # the labels that it would read are not computed here

    def index_of(batches: int) -> ImageIndex:
        labels = np.arange(batches * BATCH) % 10
        return ImageIndex.from_pixels(
            "a", np.zeros((len(labels), SIDE, SIDE, 3), np.uint8), labels, tuple("abcdefghij")
        )

    def extraction(batches: int) -> None:
        index = index_of(batches)
        extract(lambda x: x.mean((2, 3)), source, index, np.arange(len(index)), SIDE, MEAN, STD, BATCH)

    def labelled(kind: ViewKind) -> Callable[[int], None]:
        def run(batches: int) -> None:
            index = index_of(batches)
            assert index.labels is not None
            views = LabelledViews(
                index=index,
                positions=np.arange(len(index)),
                labels=index.labels,
                source=source,
                side=SIDE,
                mean=MEAN,
                std=STD,
                kind=kind,
                batch_size=BATCH,
            )
            assert len([None for _ in views.batches(1)]) == batches

        return run

    def linear(epochs: int) -> None:
        features, labels = torch.zeros(BATCH, 8, device=device), torch.zeros(BATCH, dtype=torch.long, device=device)
        batches, _ = cached_batches(features, labels, Sgd(epochs=epochs, batch_size=BATCH))
        assert len(list(batches)) == epochs

    def nearest(batches: int) -> None:
        bank, labels = torch.zeros(64, 8, device=device), torch.zeros(64, dtype=torch.long, device=device)
        knn._CHUNK_BYTES = BATCH * 64 * 4
        knn.knn_classify(bank, labels, torch.zeros(batches * BATCH, 8, device=device), num_classes=10)

    report = {}
    evaluations = {"extract": extraction, "linear": linear, "knn": nearest}
    evaluations |= {kind: labelled(kind) for kind in get_args(ViewKind)}
    for name, evaluation in evaluations.items():
        evaluation(FEW)  # allocates
        report[name] = {}
        for batches in (FEW, MANY):
            with runtime.CallLog() as log:
                evaluation(batches)
            report[name][str(batches)] = {"waits": runtime.texts(log.host_waits()), "kernels": len(log.kernels())}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
