"""A run written by version 0.1.0, before its modules became packages, still resumes, evaluates and exports.

The run was interrupted after step 8 of 16. The expected values are from that version, on one thread.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastmoco import load_backbone
from fastmoco.cli import main
from fastmoco.commands.train_arguments import parse_train
from fastmoco.errors import CheckpointError, ExitCode
from fastmoco.run.directory import read_status
from fastmoco.run.metrics import read_metrics
from fastmoco.trainer import train

ARCHIVE = Path(__file__).with_name("run-0.1.0.tar.xz")
LOSSES = [4.15374, 4.08580, 3.99023, 4.05852, 3.95465, 4.13246, 4.11211, 4.01927]  # of steps 9 to 16
WEIGHTS = "cf7d98af048e40b1e1cbe2fbd17ff2f437f69666a665bdc2a3310206cc19a870"
FEATURES = [0.16551, 0.17845, 0.30907, 0.41672, 0.29839, 0.44063]  # the first of 64, of RAMP
RAMP = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_it_resumes_with_the_same_losses(earlier: Path) -> None:
    config = parse_train(["--resume", "--out", str(earlier), "--cpu-threads", "1"])
    assert train(config, Console(quiet=True)) == earlier
    records = [record for record in read_metrics(earlier / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 17))
    losses = [record["loss"] for record in records[8:]]
    assert losses[:4] == pytest.approx(LOSSES[:4], rel=2e-3)
    assert losses[4:] == pytest.approx(LOSSES[4:], rel=2e-2)  # processors round differently, and training amplifies it
    assert read_status(earlier)["exit_code"] == ExitCode.DONE


def test_other_settings_are_still_rejected(earlier: Path) -> None:
    with pytest.raises(CheckpointError, match=r"belongs to another run: moco_t is 0\.3 and was 0\.1"):
        train(parse_train(["--resume", "--out", str(earlier), "--moco-t", "0.3"]), Console(quiet=True))


def test_its_backbone_gives_the_same_features(earlier: Path) -> None:
    backbone, preprocess = load_backbone(earlier)
    assert (preprocess.side, preprocess.mean) == (32, (0.4914, 0.4822, 0.4465))
    with torch.no_grad():
        assert backbone(RAMP)[0, :6].tolist() == pytest.approx(FEATURES, abs=2e-5)


@pytest.mark.slow
def test_it_is_evaluated_to_the_same_accuracy(earlier: Path, tmp_path: Path) -> None:
    flags = ["--limit", "300", "--device", "cpu", "--probes", "knn", "--out", str(tmp_path / "eval")]
    assert main(["eval", str(earlier), *flags]) == 0
    result = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert result["backbone"]["weights_sha256"] == WEIGHTS
    assert result["data"]["bank"] == "300 images, 53f57d20554da51c"
    assert result["data"]["queries"] == "300 images, bb60967b4e107777"
    # Two images are on the boundary of another class.
    assert result["probes"][0]["top1_percent"] == pytest.approx(17.0, abs=0.7)


def test_its_backbone_is_exported(earlier: Path, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    assert main(["export", str(earlier), "--to", "safetensors", "-o", str(path)]) == 0
    backbone, _ = load_backbone(path)
    with torch.no_grad():
        assert backbone(RAMP)[0, :6].tolist() == pytest.approx(FEATURES, abs=2e-5)
