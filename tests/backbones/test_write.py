"""What is exported is what other libraries load: the same features, or nothing is written."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmoco import load_backbone
from fastmoco.backbones.detectron2 import detectron2_name
from fastmoco.backbones.formats import SAFETENSORS
from fastmoco.backbones.read import LoadedBackbone, read_backbone
from fastmoco.backbones.write import TOLERANCE, export
from fastmoco.cli import main
from fastmoco.errors import CheckpointError, ConfigError, ExitCode
from fastmoco.model.encoder import Encoder
from tests.backbones.test_read import trained_encoder

MODELS = {
    "r18": ("resnet18", 1.0, "imagenet"),
    "r18-cifar": ("resnet18", 1.0, "cifar"),
    "r50": ("resnet50", 1.0, "imagenet"),
    "narrow": ("resnet18", 0.125, "cifar"),
}
SIDE = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Encoder, Path]]:
    """An encoder with split batch norm, and the file of its backbone."""
    folder, made = tmp_path_factory.mktemp("backbones"), {}

    def make(name: str) -> tuple[Encoder, Path]:
        if name not in made:
            arch, width, stem = MODELS[name]
            encoder = trained_encoder(arch, width=width, stem=stem)
            state = {name: tensor.contiguous() for name, tensor in encoder.backbone.state_dict().items()}
            save_file(state, folder / f"{name}.safetensors")
            made[name] = encoder, folder / f"{name}.safetensors"
        return made[name]

    return make


def backbone_of(path: Path) -> LoadedBackbone:
    return read_backbone(path, side=SIDE)


def with_stem(model: nn.Module, name: str) -> nn.Module:
    """As the summary of the export tells people to do."""
    if MODELS[name][2] == "cifar":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


@torch.no_grad()
def assert_same_features(model: nn.Module, encoder: Encoder) -> None:
    """16 images through the other library's model and through the encoder that was trained, split batch norm too."""
    images = torch.randn(16, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    found, expected = model.eval()(images), encoder.features(images)
    assert expected.std() > 0.01
    exact = encoder.double().features(images.double())
    encoder.float()
    rounding = float((expected - exact).abs().max())  # of float32, by as much as the orders of summation may differ
    assert (found - expected).abs().max() <= max(1e-5, 2 * rounding)
    assert rounding < 2e-4


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "suffix"), [("r18", "safetensors"), ("r18-cifar", "pth"), ("r50", "pth")])
def test_torchvision(made, tmp_path: Path, name: str, suffix: str) -> None:
    encoder, source = made(name)
    done = export(backbone_of(source), "torchvision", tmp_path / f"b.{suffix}")
    state = torch.load(done.path, weights_only=True) if suffix == "pth" else load_file(done.path)
    model = with_stem(torchvision.models.get_model(MODELS[name][0]), name)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])
    model.fc = nn.Identity()
    assert_same_features(model, encoder)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}
    assert done.apart <= TOLERANCE
    assert done.size_bytes == done.path.stat().st_size
    assert done.checked_with.startswith("torchvision 0.")


@pytest.mark.parametrize("name", ["r18", "r18-cifar", "r50"])
def test_timm(made, tmp_path: Path, name: str) -> None:
    encoder, source = made(name)
    done = export(backbone_of(source), "timm", tmp_path / "b.safetensors")
    model = with_stem(timm.create_model(MODELS[name][0], num_classes=0), name)
    timm.models.load_checkpoint(model, str(done.path), strict=True)
    assert_same_features(model, encoder)
    assert done.checked_with.startswith("timm 1.")


@pytest.mark.parametrize("name", ["r18", "r50"])
def test_main_lincls(made, tmp_path: Path, name: str) -> None:
    """As main_lincls.py does: rename what begins with module.encoder_q, but for the head, and delete all else."""
    encoder, source = made(name)
    path = export(backbone_of(source), "lincls", tmp_path / "moco.pth.tar").path
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint["state_dict"]
    for key in list(state):
        if key.startswith("module.encoder_q") and not key.startswith("module.encoder_q.fc"):
            state[key[len("module.encoder_q.") :]] = state[key]
        del state[key]
    model = torchvision.models.get_model(MODELS[name][0])
    assert set(model.load_state_dict(state, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
    model.fc = nn.Identity()
    assert_same_features(model, encoder)
    assert_same_features(read_backbone(path, arch=MODELS[name][0]).module, encoder)
    assert read_backbone(path).side == SIDE


def test_detectron2(made, tmp_path: Path) -> None:
    _, source = made("r50")
    path = export(backbone_of(source), "detectron2", tmp_path / "r50.pkl").path
    assert b"numpy._core" not in path.read_bytes(), "NumPy before 1.26 knows no such module"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = pickle.loads(path.read_bytes(), encoding="latin1")  # as detectron2's checkpointer reads it
    assert content["matching_heuristics"] is True
    assert isinstance(content["__author__"], str)
    arrays, state = content["model"], load_file(source)
    assert len(arrays) == 53 * 6  # convolutions, each with the five tensors of its batch norm
    assert {(array.dtype.name, type(array)) for array in arrays.values()} == {
        ("float32", np.ndarray),
        ("int64", np.ndarray),
    }
    for theirs, ours in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res2.0.shortcut.norm.weight": "layer1.0.downsample.1.weight",
        "res3.3.conv2.norm.bias": "layer2.3.bn2.bias",
        "res5.2.conv3.norm.running_mean": "layer4.2.bn3.running_mean",
    }.items():
        assert detectron2_name(ours) == theirs
        np.testing.assert_array_equal(arrays[theirs], state[ours].numpy())


@pytest.mark.parametrize("name", ["narrow", "r18-cifar"])
def test_safetensors_keeps_width_stem_and_preparation(made, tmp_path: Path, name: str) -> None:
    encoder, source = made(name)
    before = backbone_of(source)
    path = export(before, "safetensors", tmp_path / "b.safetensors").path
    after = read_backbone(path)
    assert_same_features(after.module, encoder)
    assert (after.arch, after.stem, after.width, after.side) == (before.arch, before.stem, before.width, SIDE)
    assert (after.mean, after.std, after.data) == (before.mean, before.std, before.data)
    module, preprocess = load_backbone(path)
    views = preprocess(torch.zeros(1, 3, 50, 40, dtype=torch.uint8))
    assert views.shape == (1, 3, SIDE, SIDE)
    assert module(views).shape == (1, before.feature_dim)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["narrow", "r18"])
def test_onnx_runs_on_any_batch(made, tmp_path: Path, name: str, require_backend) -> None:
    require_backend("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder, source = made(name)
    done = export(backbone_of(source), "onnx", tmp_path / "b.onnx")
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [3, SIDE, SIDE]
    assert '"side": 16' in session.get_modelmeta().custom_metadata_map["fastmoco"]

    class Session(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            parts = [session.run(["features"], {"images": part.numpy()})[0] for part in images.split([1, 3, 12])]
            return torch.from_numpy(np.concatenate(parts))

    assert_same_features(Session(), encoder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.onnx"], "the weights are in the file"


# ---- nothing is left behind ------------------------------------------------------------------------------------------


def test_a_file_that_gives_other_features_is_not_kept(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = made("narrow")
    backbone, target = backbone_of(source), tmp_path / "b.safetensors"
    kind = SAFETENSORS

    def wrong(of: LoadedBackbone, path: Path):
        assert path.exists()
        model, who = kind.load(of, path)
        return (lambda images: model(images) * 1.0001), who

    monkeypatch.setattr("fastmoco.backbones.formats.SAFETENSORS", kind._replace(load=wrong))
    with pytest.raises(CheckpointError, match=r"was not written: what fastmoco\.load_backbone makes of it gives"):
        export(backbone, "safetensors", target)
    assert list(tmp_path.iterdir()) == []
    target.write_text("before")
    with pytest.raises(CheckpointError, match=r"features that are .*e-0\d off, at most 1e-05 expected"):
        export(backbone, "safetensors", target, overwrite=True)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("broken", [lambda images: torch.full((16, 64), torch.nan), lambda images: images.flatten(1)])
def test_nan_and_another_shape_are_not_kept(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken) -> None:
    _, source = made("narrow")
    monkeypatch.setattr("fastmoco.backbones.formats.SAFETENSORS", SAFETENSORS._replace(load=lambda *_: (broken, "it")))
    with pytest.raises(CheckpointError, match="was not written"):
        export(backbone_of(source), "safetensors", tmp_path / "b.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]):
    """Runs `fastmoco export`: the exit code, and what was said."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["export", *map(str, arguments)])
        said = capsys.readouterr()
        if code != ExitCode.DONE:
            assert said.err.count("\n") == 1, said.err
            assert said.err.startswith("fastmoco: error: ")
        return code, said.out + said.err

    return call


def test_the_command_says_what_it_wrote_and_how_to_load_it(made, tmp_path: Path, command, monkeypatch) -> None:
    encoder, source = made("r18-cifar")
    monkeypatch.chdir(tmp_path)
    code, said = command(source, "--to", "timm", "-o", "deep/b.pth")
    assert code == ExitCode.DONE
    assert "resnet18 with the CIFAR stem, 512 features" in said
    assert "the features of 16 images agree to 1e-07" in said
    assert str(tmp_path / "deep" / "b.pth") in said
    names: dict[str, Any] = {}
    exec(said.split("load it")[1].strip(), names)  # what people will paste
    model = names["model"]
    model.reset_classifier(0)
    assert_same_features(model, encoder)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("narrow", ["--to", "timm", "-o", "b.pth"], "timm builds no resnet18 with width 0.125: use --to safetensors"),
        ("r18-cifar", ["--to", "lincls", "-o", "b.pth"], "with the CIFAR stem: use --to torchvision or timm or safete"),
        ("r18-cifar", ["--to", "detectron2", "-o", "b.pkl"], "detectron2 builds no resnet18 with the CIFAR stem"),
        ("narrow", ["--to", "safetensors", "-o", "b.pth"], "expected a name that ends with .safetensors"),
        ("narrow", ["--to", "safetensors", "-o", "there.safetensors"], "exists: use --overwrite"),
        ("narrow", ["--to", "safetensors", "-o", "link.safetensors", "--overwrite"], "is a link, a folder or a device"),
        ("narrow", ["--to", "safetensors", "-o", "folder.safetensors", "--overwrite"], "is a link, a folder or a dev"),
        ("narrow", ["--to", "safetensors", "-o", "there.safetensors/b.safetensors"], "cannot write"),
        ("narrow", ["--to", "tensorflow", "-o", "b.pb"], "tensorflow"),
        ("narrow", ["--to", "safetensors", "-o", "b.safetensors", "--overwrit"], "did you mean --overwrite?"),
    ],
)
def test_wrong_arguments(made, tmp_path: Path, monkeypatch, command, name: str, arguments: list[str], said: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").write_text("before")
    (tmp_path / "link.safetensors").symlink_to("elsewhere")
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, found = command(made(name)[1], *arguments)
    assert code == ExitCode.CONFIG
    assert said in found
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.safetensors").read_text() == "before"


def test_no_backbone_is_a_checkpoint_error(tmp_path: Path, command) -> None:
    code, said = command(tmp_path / "absent", "--to", "timm", "-o", tmp_path / "b.pth")
    assert code == ExitCode.CHECKPOINT
    assert "there is no file or folder" in said


def test_overwrite_replaces(made, tmp_path: Path, command) -> None:
    target = tmp_path / "b.safetensors"
    target.write_text("before")
    code, _ = command(made("narrow")[1], "--to", "safetensors", "-o", target, "--overwrite")
    assert code == ExitCode.DONE
    assert read_backbone(target).width == 0.125


def test_onnx_that_is_not_installed_is_one_line(made, tmp_path: Path, command, monkeypatch) -> None:
    find = "fastmoco.backbones.formats.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None if name == "onnxscript" else True)
    code, said = command(made("narrow")[1], "--to", "onnx", "-o", tmp_path / "b.onnx")
    assert code == ExitCode.CONFIG
    assert "--to onnx needs onnxscript, which is not installed: uv sync --inexact --extra onnx" in said
    assert list(tmp_path.iterdir()) == []


def test_timm_that_is_not_installed_leaves_the_check_to_torchvision(made, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fastmoco.backbones.formats.importlib.util.find_spec", lambda name: None)
    done = export(backbone_of(made("r18")[1]), "timm", tmp_path / "b.pth")
    assert done.checked_with == "torchvision (timm is not installed)"


def test_an_unknown_target_is_a_fault_of_the_caller(made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a name that ends with \.pkl"):
        export(backbone_of(made("r18")[1]), "detectron2", tmp_path / "b.pth")
