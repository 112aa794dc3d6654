"""A run on images of four channels: scan, train, evaluate, export and load, each with the channels of the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastmoco
from fastmoco.backbones.read import read_backbone
from fastmoco.cli import main
from fastmoco.errors import CheckpointError, ConfigError, ExitCode
from fastmoco.model.encoder import build_encoder
from fastmoco.model.input_channels import first_convolution, set_channels
from fastmoco.run.normalization import sampled_normalization
from pipelines.data.index import ImageIndex
from pipelines.data.scan import mean_and_std

TINY = "--channels 4 --arch resnet18 --epochs 1 --batch-size 8 --bn-splits 2 --crop-size 16 --amp fp32 --device cpu "
TINY += "--cpu-threads 1 --workers 0 --no-tensorboard"


@pytest.fixture
def bands(tmp_path: Path) -> Path:
    """Two classes of twenty arrays (4, H, W) of 12 bits in 16."""
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "bands" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i}.npy", rng.integers(0, 4096, (4, 18 + i, 21), dtype=np.uint16))
    return tmp_path / "bands"


def failure(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main([*argv]) != ExitCode.DONE
    return capsys.readouterr().err


@pytest.mark.slow
def test_the_path_from_scan_to_a_loaded_backbone(bands: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    value_range = ["--value-range", "0", "4095"]
    train = ["train", "--data", "bands", *TINY.split(), *value_range]
    assert main(["scan", "bands", "--channels", "4", "--workers", "0", *value_range]) == ExitCode.DONE
    printed = capsys.readouterr().out
    assert "NPY CHW;uint16 40" in printed
    assert "the 4 bands of the training images" in printed
    assert main([*train, "--out", "run", "--normalization", "scan", "--pipeline", "torch"]) == ExitCode.DONE
    printed = " ".join(capsys.readouterr().out.split())
    assert "arrays are taken as (channels, height, width)" in printed
    assert "without saturation, hue and greyscale" in printed
    assert "(as scanned)" in printed

    config = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    assert config["data"]["channels"] == len(config["augment"]["mean"]) == len(config["augment"]["std"]) == 4
    with Image.open("run/views.png") as picture:
        assert picture.mode == "RGB"
    assert main([*train, "--out", "run", "--normalization", "scan", "--pipeline", "torch", "--resume"]) == ExitCode.DONE
    refused = failure(capsys, "eval", "run", "--channels", "2", "--device", "cpu")
    assert "--channels is 2, and run/" in refused
    assert "reads images of 4 channels: leave it out" in refused

    evaluate = ["eval", "run", "--device", "cpu", "--cpu-threads", "1", "--probes", "knn", "--no-feature-cache"]
    assert main(evaluate) == ExitCode.DONE
    assert Path("run/eval/retrieval.png").is_file()

    assert "torchvision builds no resnet18 for images of 4 channels" in failure(
        capsys, "export", "run", "--to", "torchvision", "-o", "moco.pth"
    )
    for target, name in (("safetensors", "moco.safetensors"), ("timm", "moco.pth")):
        assert main(["export", "run", "--to", target, "-o", name]) == ExitCode.DONE
    printed = " ".join(capsys.readouterr().out.split())
    assert "timm.create_model('resnet18', in_chans=4)" in printed
    assert "torch.nn.Conv2d(4, 64, 3, padding=1, bias=False)" in printed
    backbone, preprocess = fastmoco.load_backbone("run")
    image = torch.randint(0, 256, (4, 30, 40), dtype=torch.uint8)
    features = backbone(preprocess(image)[None])
    assert features.shape == (1, 512)
    for name in ("moco.safetensors", "moco.pth"):
        again, prepare = fastmoco.load_backbone(name, side=16)
        assert torch.equal(again(preprocess(image)[None]), features)
        assert len(prepare.mean) == 4
    assert torch.equal(fastmoco.load_backbone("moco.safetensors")[1](image), preprocess(image))
    with pytest.raises(ValueError, match=r"expected a PIL image or uint8 of shape \(..., 4, H, W\)"):
        preprocess(image[:3])
    rgba = Image.fromarray(image.permute(1, 2, 0).numpy(), "RGBA")
    assert torch.equal(preprocess(rgba), preprocess(image))

    wrong = ["train", "--data", "bands", "--init", "moco.safetensors", "--out", "other"]
    assert "have 4 bands, and --channels is 3: give --channels 4" in failure(capsys, *wrong)
    Image.new("RGB", (32, 32)).save("1.png")
    Path("list.txt").write_text("1.png\n" * 8, encoding="utf-8")
    wrong[2] = "list.txt"
    assert "reads images of 4 channels: use --channels 4" in failure(capsys, *wrong)
    assert "scanned --channels 4 --value-range 0 4095: run fastmoco scan bands --channels 4 again" in failure(
        capsys, *train[: -len(value_range)], "--normalization", "scan", "--out", "other"
    )


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_only_the_first_convolution_differs(channels: int, stem: str) -> None:
    torch.manual_seed(0)
    usual = build_encoder("resnet18", width=0.25, stem=stem)
    torch.manual_seed(0)
    other = build_encoder("resnet18", width=0.25, stem=stem, channels=channels)
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in usual.state_dict().items()}
    kernel = 7 if stem == "imagenet" else 3
    expected["backbone.conv1.weight"] = torch.Size([16, channels, kernel, kernel])
    assert shapes == expected
    assert other.backbone.conv1.weight.std().item() == pytest.approx((2 / (16 * kernel**2)) ** 0.5, rel=0.15)
    assert other(torch.zeros(4, channels, 32, 32)).shape == (4, 128)


def test_three_channels_are_built_as_before_and_groups_are_refused() -> None:
    torch.manual_seed(0)
    before = build_encoder("resnet18", width=0.25)
    numbers = torch.get_rng_state()
    torch.manual_seed(0)
    now = build_encoder("resnet18", width=0.25, channels=3)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), now.parameters(), strict=True))
    with pytest.raises(ConfigError, match="in 3 groups"):
        set_channels(torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, groups=3)), 4)
    with pytest.raises(ConfigError, match="no convolution"):
        first_convolution(torch.nn.Linear(3, 3))


def test_a_state_dict_of_two_channels_is_read_and_a_contradiction_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_encoder("resnet18", width=0.25, channels=2).backbone
    torch.save(backbone.state_dict(), tmp_path / "two.pth")
    loaded = read_backbone(tmp_path / "two.pth")
    assert (loaded.channels, loaded.mean, loaded.arch) == (2, (0.449, 0.449), "resnet18")
    images = torch.randn(2, 2, 64, 64)
    torch.testing.assert_close(loaded.module(images), backbone.eval()(images), rtol=1e-4, atol=1e-5)
    record = '{"side": 32, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "data": null}'
    torch.save(backbone.state_dict() | {"fastmoco": record}, tmp_path / "three.pth")
    with pytest.raises(CheckpointError, match="said to have 3 channels, its tensors: 2"):
        read_backbone(tmp_path / "three.pth")


def test_mean_and_std_without_a_scan_are_those_of_the_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 7, 4), dtype=np.uint8)
    mean, std, count = sampled_normalization(ImageIndex.from_pixels("x", pixels))
    expected = pixels.reshape(-1, 4) / 255
    np.testing.assert_allclose(mean, expected.mean(0), atol=1e-4)
    np.testing.assert_allclose(std, expected.std(0), atol=1e-4)
    assert count == 9
    histogram = np.stack([np.bincount(band.ravel(), minlength=256) for band in np.moveaxis(pixels, 3, 0)])
    np.testing.assert_allclose(mean_and_std(histogram)[0], mean, atol=1e-4)
    pixels[..., 3] = 255
    with pytest.raises(ConfigError, match=r"channel 4 of 4 has one value in all of 9 images \(an opaque alpha"):
        sampled_normalization(ImageIndex.from_pixels("x", pixels))
