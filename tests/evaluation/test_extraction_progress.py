"""The progress of an extraction counts images, not the padding of its last batch."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from fastmoco import progress
from fastmoco.backbones.read import LoadedBackbone
from fastmoco.evaluation.extractor import Extractor
from fastmoco.evaluation.options import EvalOptions
from fastmoco.evaluation.splits import Subset
from pipelines.data.index import ImageIndex
from pipelines.data.shapes import CLASS_NAMES, make_shapes

IMAGES, SIDE = 300, 16  # a batch of 256, and one of 44


def test_the_count_ends_at_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Progress] = []

    def recorded(*arguments: Any, **options: Any) -> Progress:
        bars.append(Progress(*arguments, **options))
        return bars[-1]

    monkeypatch.setattr(progress, "Progress", recorded)
    pixels, labels = make_shapes(IMAGES, size=SIDE)
    index = ImageIndex.from_pixels("shapes", pixels, labels, CLASS_NAMES)
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    fields: dict[str, Any] = {"arch": "resnet18", "stem": "cifar", "width": 1.0, "feature_dim": 12, "side": SIDE}
    fields |= {"mean": (0.5,) * 3, "std": (0.25,) * 3, "origin": "here", "data": None}
    backbone = LoadedBackbone(module=module, **fields)
    options = EvalOptions(run="here", feature_cache=False, pipeline="resident")
    console = Console(file=io.StringIO(), force_terminal=True)
    assert len(Extractor(backbone, options, torch.device("cpu"), console).features(Subset.all_of(index))) == IMAGES
    (task,) = bars[0].tasks
    assert (task.completed, task.total) == (IMAGES, IMAGES)
