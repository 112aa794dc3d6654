"""A run's own mean and std: from `fastmoco scan` to the views, the settings, the export and the features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco import load_backbone
from fastmoco.backbones.read import read_backbone
from fastmoco.cli import main
from fastmoco.errors import ConfigError, ExitCode
from fastmoco.run.normalization import scanned_normalization

TINY = "--batch-size 8 --bn-splits 2 --moco-k 16 --width 0.125 --epochs 1 --arch resnet18 --crop-size 8 --amp fp32 "
TINY += "--knn-every 0 --no-tensorboard --device cpu --pipeline torch --workers 0 --no-mlp"


@pytest.fixture
def dark(tmp_path: Path) -> Path:
    """Sixteen pictures of red 10 or 50, green 20 and 40, blue 0 and 255, half of the pixels each."""
    folder = tmp_path / "dark"
    folder.mkdir()
    for i in range(16):
        pixels = np.empty((8 + i, 12, 3), dtype=np.uint8)
        pixels[:, :6], pixels[:, 6:] = (10, 20, 0), (50, 40, 255)
        Image.fromarray(np.roll(pixels, i, axis=1)).save(folder / f"{i:02}.png")
    return folder


MEAN, STD = (round(30 / 255, 4), round(30 / 255, 4), 0.5), (round(20 / 255, 4), round(10 / 255, 4), 0.5)


def test_mean_and_std_are_those_of_the_scan(dark: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'?dark'?, which has not been scanned: run fastmoco scan"):
        scanned_normalization(("dark",), str(tmp_path / "cache"))
    assert main(["scan", str(dark), "--workers", "0"]) == ExitCode.DONE
    printed = capsys.readouterr().out
    assert " ".join(f"{value:.4f}" for value in MEAN) in printed
    for data in (("dark",), (str(dark),), ["dark", str(dark)]):
        assert scanned_normalization(data, str(tmp_path / "cache")) == (MEAN, STD)


def test_images_of_one_colour_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "black"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    assert main(["scan", str(folder), "--workers", "0"]) == ExitCode.DONE
    with pytest.raises(ConfigError, match=r"have a std of 0: give --mean and --std"):
        scanned_normalization((str(folder),), str(tmp_path))


def test_a_data_set_without_files_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is for folders and lists of images, not for cifar10: give --mean and --std"
    ):
        scanned_normalization(("cifar10",), str(tmp_path))


@pytest.mark.slow
def test_everything_after_the_run_uses_its_own_numbers(dark: Path, tmp_path: Path, capsys) -> None:
    assert main(["scan", str(dark), "--workers", "0"]) == ExitCode.DONE
    out, cache = tmp_path / "run", ["--data-root", str(tmp_path / "cache")]
    switches = ["--normalization", "scan", "--color-jitter", "0", "--hflip", "0"]
    train = ["train", *TINY.split(), "--data", str(dark), "--out", str(out), *cache]
    assert main([*train, *switches]) == ExitCode.DONE
    printed = capsys.readouterr().out
    assert "augmentation cifar; no horizontal flips; no colour jitter; mean 0.1176 0.1176 0.5, std" in printed
    augment = json.loads((out / "config.json").read_text())["augment"]
    assert (augment["mean"], augment["std"], augment["hflip"]) == (list(MEAN), list(STD), 0.0)

    assert main(["train", "--resume", "--out", str(out)]) == ExitCode.DONE
    (dark / ".fastmoco-manifest.npz").unlink()  # the numbers are the run's from now on
    exported = tmp_path / "exported.safetensors"
    assert main(["export", str(out), "--to", "safetensors", "--out", str(exported)]) == ExitCode.DONE
    for path in (out, exported, out / "backbone.safetensors", next((out / "checkpoints").glob("*.safetensors"))):
        found = read_backbone(path)
        assert (found.mean, found.std) == (MEAN, STD), path
    _, preprocess = load_backbone(exported)
    view = preprocess(Image.new("RGB", (8, 8), (50, 20, 255)))
    expected = (torch.tensor([50, 20, 255]) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(view[:, 3, 3], expected)
    assert main(["eval", str(out), "--device", "cpu", "--no-pictures", *cache]) == ExitCode.DONE
    capsys.readouterr()
    assert main([*train[:1], "--resume", "--out", str(out), "--hflip", "0.5"]) == ExitCode.CHECKPOINT
    assert "hflip is 0.5 and was 0.0" in capsys.readouterr().err
