"""Runs of models of timm: trained, resumed bit for bit, continued from files, evaluated and exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import fastmoco
from fastmoco.cli import main
from fastmoco.errors import ExitCode
from fastmoco.registry import EXPORT_TARGETS
from tests.oddities import encode, picture
from tests.run.test_train import newest

TINY = ["--limit", "32", "--batch-size", "8", "--bn-splits", "2", "--moco-k", "16", "--epochs", "2", "--knn-k", "5"]
TINY += ["--amp", "fp32", "--device", "cpu", "--workers", "1", "--cpu-threads", "1", "--pipeline", "resident"]
TINY += ["--crop-size", "32", "--no-tensorboard", "--lr", "0.003"]
SMALL = ("test_efficientnet", "test_convnext")
PUBLISHED = ("resnet10t", "regnetx_002", "efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto")
EVERY = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)]


def train(*arguments: str | Path) -> int:
    return main(["train", *TINY, *map(str, arguments)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(runs: Path) -> Path:
    run = runs / "trained"
    assert train("shapes", "--arch", "timm/test_efficientnet", "--out", run, "--checkpoint-every", "4") == 0
    return run


@pytest.mark.parametrize("name", EVERY)
def test_it_trains_and_goes_on_from_any_step_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert train("shapes", "--arch", f"timm/{name}", "--out", whole, "--checkpoint-every", "4") == 0
    config = json.loads((whole / "config.json").read_text())
    assert (config["model"]["arch"], config["model"]["stem"]) == (f"timm/{name}", "imagenet")
    middle = min((whole / "checkpoints").glob("*.safetensors"))
    assert main(["train", "--resume-from", str(middle), "--out", str(half)]) == 0
    ours, expected = newest(half), newest(whole)
    assert ours.keys() == expected.keys()
    assert [n for n, tensor in ours.items() if not torch.equal(tensor, expected[n])] == []
    before = load_file(middle)
    query = "model/query.backbone."
    assert any(not torch.equal(before[n], expected[n]) for n in expected if n.startswith(query))
    module, preprocess = fastmoco.load_backbone(half)
    theirs = timm.create_model(name, num_classes=0)
    theirs.load_state_dict({n.removeprefix(query): t for n, t in expected.items() if n.startswith(query)}, strict=False)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(module(x), theirs.eval()(x))
    assert preprocess.side == 32


def test_photographs_are_normalised_as_timm_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(16):
        (photos / f"{i}.jpg").write_bytes(encode(np.roll(picture(80, 90), i, axis=1), "JPEG"))
    flags = ["--arch", "timm/test_resnet", "--crop-size", "72", "--epochs", "1"]
    assert main(["train", str(photos), *TINY, *flags, "--out", str(tmp_path / "own")]) == 0
    said = capsys.readouterr().out
    assert "mean and std as timm normalises for it" in said
    assert "mean 0.5, std 0.5" in said
    augment = json.loads((tmp_path / "own" / "config.json").read_text())["augment"]
    assert (augment["mean"], augment["std"]) == ([0.5] * 3, [0.5] * 3)
    assert fastmoco.load_backbone(tmp_path / "own")[1].mean == (0.5, 0.5, 0.5)
    given = ["--normalization", "imagenet", "--out", str(tmp_path / "given")]
    assert main(["train", str(photos), *TINY, *flags, *given]) == 0
    assert fastmoco.load_backbone(tmp_path / "given")[1].mean == (0.485, 0.456, 0.406)


def test_the_start_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--arch", "timm/test_convnext", "--stem-format", "contiguous", "--epochs", "1"]
    assert train("shapes", *flags, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "without batch norm to split, with LayerNorm" in said
    assert "--stem-format contiguous is for our ResNets: left out" in said
    assert "32 pixels leave a last feature map of 1×1: --crop-size 64 or more" in said


def test_a_recipe_of_our_resnet_takes_a_model_of_timm(tmp_path: Path) -> None:
    """Its width and stem are of the ResNet, and not for this one."""
    flags = ["--arch", "timm/test_byobnet", "--epochs", "1", "--moco-k", "32", "--out", str(tmp_path / "run")]
    assert main(["train", "shapes", *TINY, *flags]) == 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--arch timm/vit_tiny_patch16_224", 2, "transformers need MoCo v3"),
        ("--arch timm/regnetx_02", 2, "timm has no model 'regnetx_02'; did you mean"),
        ("--arch timm/", 2, "--arch is 'timm/', expected one of"),
        ("--arch timm/test_resnet --width 0.5", 2, "--width 0.5 is for the ResNets of torchvision's names"),
        ("--arch timm/test_resnet --stem cifar", 2, "use --stem auto"),
        ("--arch timm/test_resnet --checkpoint-activations", 2, "does not support --checkpoint-activations"),
        ("--arch own/Net", 2, "only Python can give: fastmoco.train(model=Net(), ...)"),
    ],
)
def test_what_cannot_be_is_one_line(
    flags: str, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("shapes", *flags.split(), "--out", tmp_path / "run") == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


# ---- files -----------------------------------------------------------------------------------------------------------


def classifier(name: str, path: Path, **wrapped: str) -> nn.Module:
    """A file of timm's model with its classifier, as its train.py or a hub has it."""
    model = timm.create_model(name)
    state = {wrapped.get("prefix", "") + key: tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "arch": name}, path)
    return model


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "test_byobnet"])
@torch.no_grad()
def test_a_checkpoint_of_timm_is_read_once_it_is_named(name: str, tmp_path: Path) -> None:
    theirs = classifier(name, tmp_path / "theirs.pth", prefix="module.")
    module, preprocess = fastmoco.load_backbone(tmp_path / "theirs.pth", arch=f"timm/{name}")
    x = torch.randn(2, 3, 64, 64)
    expected = theirs.eval().forward_head(theirs.forward_features(x), pre_logits=True)  # pyright: ignore
    torch.testing.assert_close(module(x), expected)
    assert preprocess.side == 160, "timm's own size"
    with pytest.raises(ValueError, match=r"not those of timm/test_resnet|holds no timm/test_resnet"):
        fastmoco.load_backbone(tmp_path / "theirs.pth", arch="timm/test_resnet")


def test_training_begins_with_the_weights_of_a_file_or_run(tmp_path: Path, trained: Path) -> None:
    classifier("test_efficientnet", tmp_path / "theirs.pth")
    flags = ["--epochs", "1", "--lr", "1e-12", "--out"]
    arch = ["--arch", "timm/test_efficientnet"]
    assert (
        main(["train", "shapes", *TINY, *arch, "--init", str(tmp_path / "theirs.pth"), *flags, str(tmp_path / "a")])
        == 0
    )
    state = torch.load(tmp_path / "theirs.pth")["state_dict"]
    assert torch.equal(newest(tmp_path / "a")["model/query.backbone.conv_stem.weight"], state["conv_stem.weight"])
    assert main(["train", "--data", "shapes", *TINY, "--init", str(trained), *flags, str(tmp_path / "b")]) == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())["model"]
    assert config["arch"] == "timm/test_efficientnet", "the run says what it is"
    name = "model/query.backbone.conv_stem.weight"
    assert torch.equal(newest(tmp_path / "b")[name], newest(trained)[name])


def test_evaluation_and_another_arch(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--probes", "knn", "--no-pictures", "--limit", "64", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "timm/test_efficientnet, 256 features" in said
    assert main(["eval", str(trained), "--arch", "timm/test_resnet"]) == ExitCode.CHECKPOINT
    assert "has the arch timm/test_efficientnet, and timm/test_resnet was requested" in capsys.readouterr().err


# ---- export ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_line_of_the_export_makes_the_model_of_timm(
    trained: Path, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = f"it's.{suffix}"
    assert main(["export", str(trained), "--to", "timm", "-o", str(path)]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if "load it" in line).split("load it")[1].strip()
    create = f"timm.create_model('test_efficientnet', checkpoint_path={path!r}, num_classes=0)"
    assert line == f"import timm; model = {create}"
    names: dict = {}
    exec(line, names)
    x = torch.randn(16, 3, 32, 32)
    torch.testing.assert_close(names["model"].eval()(x), fastmoco.load_backbone(trained)[0](x))
    counters = {int(t) for n, t in names["model"].state_dict().items() if n.endswith("num_batches_tracked")}
    assert counters == {8}, "the steps of the run, which torch's batch norm counts"
    again, _ = fastmoco.load_backbone(path, arch="timm/test_efficientnet")
    assert {int(t) for n, t in again.state_dict().items() if n.endswith("num_batches_tracked")} == {8}


@torch.no_grad()
@pytest.mark.parametrize("target", ["safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_exports_that_say_what_they_are(trained: Path, target: str, tmp_path: Path, require_backend) -> None:
    if target == "onnx":
        require_backend("onnx")
    path = tmp_path / f"b.{target}"
    assert main(["export", str(trained), "--to", target, "-o", str(path)]) == 0
    if target == "safetensors":
        x = torch.randn(2, 3, 32, 32)
        module, preprocess = fastmoco.load_backbone(path)
        expected, own = fastmoco.load_backbone(trained)
        torch.testing.assert_close(module(x), expected(x))
        assert (preprocess.side, preprocess.mean) == (own.side, own.mean)


@pytest.mark.parametrize("target", [t for t in EXPORT_TARGETS if t not in ("timm", "safetensors", "onnx")])
def test_libraries_without_the_model_are_refused(
    trained: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"b{EXPORT_TARGETS[target].suffixes[0]}"
    assert main(["export", str(trained), "--to", target, "-o", str(path)]) == 2
    expected = f"{target} builds no timm/test_efficientnet: use --to timm or safetensors or onnx"
    assert expected in capsys.readouterr().err
    assert not path.exists()


def test_without_a_name_the_export_is_in_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained), "--to", "timm"]) == 0
    path = trained / "trained-timm.pth"
    assert path.is_file()
    assert "trained-timm.pth" in capsys.readouterr().out
    assert main(["export", str(max((trained / "checkpoints").glob("*.safetensors"))), "--to", "timm"]) == 2
    assert "trained-timm.pth exists: use --overwrite" in capsys.readouterr().err
    path.unlink()
