"""Backbones of timm for images of other channels than three: read, written and evaluated as such."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from fastmoco import embed
from fastmoco.backbones.read import read_backbone
from fastmoco.commands.export import load_lines
from fastmoco.errors import CheckpointError, ConfigError

ARCH = "timm/test_convnext"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bands.pth"
    torch.save(timm.create_model(ARCH.removeprefix("timm/"), in_chans=4, num_classes=0).state_dict(), path)
    return path


def test_its_channels_follow_from_the_file(file: Path) -> None:
    backbone = read_backbone(file, arch=ARCH, side=32)
    assert backbone.channels == len(backbone.mean) == len(backbone.std) == 4
    images = torch.randn(2, 4, 32, 32)
    line = load_lines(backbone, "timm", str(file))
    assert line.endswith("num_classes=0, in_chans=4)")
    names: dict = {}
    exec(line, names)
    torch.testing.assert_close(names["model"].eval()(images), backbone.module(images))


def test_another_kernel_is_still_refused(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    first = next(name for name, tensor in state.items() if tensor.ndim == 4)
    state[first] = state[first][..., :1]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=f"{first} is "):
        read_backbone(tmp_path / "other.pth", arch=ARCH)


def test_images_are_read_with_the_channels_of_the_backbone(file: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        np.save(tmp_path / "images" / f"{i}.npy", np.full((20, 24, 4), 40 * i, np.uint8))
    embeddings = embed(tmp_path / "images", file, arch=ARCH, crop_size=32, device="cpu", pipeline="torch", workers=0)
    assert len(embeddings) == 3
    assert len(np.unique(embeddings.features[:, 0])) == 3
    with pytest.raises(ConfigError, match=r"--channels is 2, and .* reads images of 4 channels: leave it out"):
        embed(tmp_path / "images", file, arch=ARCH, crop_size=32, channels=2)
