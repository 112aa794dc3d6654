"""What a run prints at its start about the colours of its views."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastmoco.run import report
from pipelines.augment import c_ops


def lines(pipeline: str, device: str) -> list[str]:
    config: Any = SimpleNamespace(data=SimpleNamespace(pipeline=pipeline))
    world: Any = SimpleNamespace(device=torch.device(device))
    return [" ".join(fact) for fact in report._colour(config, world)]


@pytest.mark.parametrize("pipeline", ["resident", "torch", "dali", "ffcv"])
def test_colours_that_are_not_compiled_are_a_line(pipeline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_ops, "loop", lambda: c_ops.Loop(None, "no C compiler was found"))
    (line,) = lines(pipeline, "cpu")
    assert line.startswith("colour in torch")
    assert line.endswith("no C compiler was found")
    assert lines(pipeline, "cuda") == lines("dataloader", "cpu") == []


def test_compiled_colours_are_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_ops, "loop", lambda: c_ops.Loop(object()))  # type: ignore[arg-type]
    assert lines("torch", "cpu") == []
