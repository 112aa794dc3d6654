"""Weights that are finite and whose features are not end a run with exit code 5 at its next evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.evaluation.online import OnlineEvaluator
from fastmoco.model.encoder import Encoder
from tests.oddities import encode, picture
from tests.run.test_train import RESIDENT

FLAGS = [*RESIDENT, "--knn-every", "1", "--epochs", "1", "--no-tensorboard", "--cpu-threads", "1", "--check", "off"]


@pytest.mark.parametrize("labels", [True, False])
def test_features_that_are_not_finite_are_divergence(
    labels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, calls = tmp_path / "photos", []
    photos.mkdir()
    for i in range(32):
        (photos / f"{i}.png").write_bytes(encode(np.roll(picture(12, 12), i, axis=1), "PNG"))
    original = OnlineEvaluator.evaluate

    def with_large_weights(self: OnlineEvaluator, encoder: Encoder) -> dict[str, float]:
        calls.append(encoder)
        if len(calls) == 2:  # after the first epoch; in inference, batch norm does not scale these down
            with torch.no_grad():
                encoder.backbone.get_parameter("conv1.weight").mul_(1e38)
        return original(self, encoder)

    monkeypatch.setattr(OnlineEvaluator, "evaluate", with_large_weights)
    data = [] if labels else ["--data", str(photos)]
    assert main(["train", *FLAGS, *data, "--out", str(tmp_path / "run")]) == ExitCode.DIVERGED
    (line,) = capsys.readouterr().err.splitlines()
    assert "the features of the evaluation are not finite, though the weights are: lower --lr" in line
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
