"""A backbone comes back from every file that holds one, as it was; everything else is refused in one line."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastmoco
from fastmoco.backbones.description import RECORD
from fastmoco.backbones.read import LoadedBackbone, read_backbone
from fastmoco.cli import main
from fastmoco.errors import CheckpointError, ConfigError, ExitCode
from fastmoco.model.architectures import identify
from fastmoco.model.encoder import Encoder, build_encoder
from fastmoco.registry import ARCHITECTURES
from pipelines.augment.presets import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD
from tests.oddities import fill

TINY = ["--limit", "16", "--batch-size", "8", "--bn-splits", "2", "--moco-k", "16", "--width", "0.125", "--epochs", "2"]
TINY += ["--arch", "resnet18", "--crop-size", "16", "--amp", "fp32", "--knn-every", "0", "--no-tensorboard"]
TINY += ["--device", "cpu", "--pipeline", "resident", "--workers", "1", "--checkpoint-every", "2", "--aug", "v2"]


def trained_encoder(arch: str = "resnet18", *, width: float = 0.125, stem: str = "cifar") -> Encoder:
    """In evaluation, with split batch norm whose statistics are those of some batch and not their initial values."""
    torch.manual_seed(0)
    encoder = build_encoder(arch, width=width, stem=stem, head=(8,), dim=4, bn_splits=2)
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        encoder(torch.randn(8, 3, 32, 32))
    return encoder.eval()


def authors_state(encoder: Encoder) -> dict[str, Tensor]:
    """Names as in a checkpoint of main_moco.py with --mlp: both encoders and the queue."""
    names = {name: name.replace("backbone.", "").replace("head.", "fc.") for name in encoder.state_dict()}
    state = {f"module.encoder_q.{names[n]}": tensor for n, tensor in encoder.state_dict().items()}
    state |= {f"module.encoder_k.{names[n]}": tensor * 0 for n, tensor in encoder.state_dict().items()}
    return state | {"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}


def authors_file(path: Path, encoder: Encoder, **options: Any) -> Path:
    optimiser = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    content = {"epoch": 200, "arch": "resnet18", "state_dict": authors_state(encoder), "optimizer": optimiser}
    torch.save(content, path, **options)
    return path


@torch.no_grad()
def assert_same_features(found: LoadedBackbone, encoder: Encoder, side: int = 32) -> None:
    """In float64, where the order of a sum does not show."""
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = copy.deepcopy(found.module).double()(images)
    assert features.shape == (4, found.feature_dim)
    assert features.std() > 0.01, "features of zero would agree with anything"
    torch.testing.assert_close(features, copy.deepcopy(encoder).double().features(images), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return trained_encoder()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *TINY, "--out", str(out)]) == ExitCode.DONE
    return out


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A run that may be damaged."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def encoder_of(run: Path, step: int) -> Encoder:
    state = load_file(run / "checkpoints" / f"step-{step:09d}.safetensors")
    encoder = build_encoder("resnet18", width=0.125, stem="cifar", dim=128, bn_splits=2)
    prefix = "model/query."
    encoder.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    return encoder.eval()


# ---- our runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "checkpoints/step-000000004.safetensors", "backbone.safetensors"])
def test_a_run_its_checkpoint_and_its_backbone_are_the_same(run: Path, name: str) -> None:
    found = read_backbone(run / name)
    assert_same_features(found, encoder_of(run, 4), 16)
    assert (found.arch, found.stem, found.width, found.feature_dim) == ("resnet18", "cifar", 0.125, 64)
    assert (found.side, found.mean, found.std) == (16, IMAGENET_MEAN, IMAGENET_STD)  # --aug v2, not that of the stem
    assert found.data == "shapes"
    assert found.origin.startswith(str(run))
    assert found.module.training is False


def test_an_earlier_checkpoint_is_that_step(run: Path) -> None:
    assert_same_features(read_backbone(run / "checkpoints" / "step-000000002.safetensors"), encoder_of(run, 2), 16)


def test_an_unfinished_run_has_its_newest_checkpoint(copied: Path) -> None:
    (copied / "backbone.safetensors").unlink()
    assert_same_features(read_backbone(copied), encoder_of(copied, 4), 16)


def test_a_run_without_checkpoints_has_its_backbone(copied: Path) -> None:
    expected = encoder_of(copied, 4)
    shutil.rmtree(copied / "checkpoints")
    found = read_backbone(copied)
    assert_same_features(found, expected, 16)
    assert (found.side, found.mean, found.data) == (16, IMAGENET_MEAN, "shapes")
    (copied / "backbone.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint and no backbone\.safetensors"):
        read_backbone(copied)


def test_a_damaged_checkpoint_is_passed_over_in_a_run_and_refused_by_name(copied: Path) -> None:
    newest = copied / "checkpoints" / "step-000000004.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    found = read_backbone(copied)
    assert_same_features(found, encoder_of(copied, 2), 16)
    assert found.origin.endswith("step-000000002.safetensors (1 newer damaged)")
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
        read_backbone(newest)


def test_a_checkpoint_without_its_hash_is_refused(copied: Path) -> None:
    (copied / "checkpoints" / "step-000000004.safetensors.sha256").unlink()
    with pytest.raises(CheckpointError, match="cannot be verified"):
        read_backbone(copied / "checkpoints" / "step-000000004.safetensors")


# ---- files of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_the_authors_checkpoint(tmp_path: Path, encoder: Encoder, zipped: bool) -> None:
    path = authors_file(tmp_path / "moco_v2.pth.tar", encoder, _use_new_zipfile_serialization=zipped)
    found = read_backbone(str(path), arch="resnet18", stem="cifar", side=24)
    assert_same_features(found, encoder)
    assert (found.side, found.mean, found.std, found.data) == (24, CIFAR_MEAN, CIFAR_STD, None)
    assert found.origin == f"{path} (state_dict.module.encoder_q, not state_dict.module.encoder_k)"


def test_the_authors_cifar_demo(tmp_path: Path, encoder: Encoder) -> None:
    """Its ModelBase numbers the children of a ResNet, the pooling left out and a flattening before fc put in."""
    children = ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "layer4", "avgpool", "flatten", "fc"]
    state = {}
    for name, tensor in authors_state(encoder).items():
        which, _, rest = name.removeprefix("module.").partition(".")
        child, _, rest = rest.partition(".")
        if which == "encoder_q":
            state[f"encoder_q.net.{children.index(child)}.{rest}"] = tensor
    torch.save({"epoch": 200, "state_dict": state, "optimizer": {}}, tmp_path / "model_last.pth")
    assert_same_features(read_backbone(tmp_path / "model_last.pth"), encoder)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_of_torchvision(tmp_path: Path, prefix: str) -> None:
    """As torchvision's downloads and as main_lincls.py writes it; the classifier is left out."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state if not prefix else {"state_dict": state, "best_acc1": torch.tensor(60.0)}, tmp_path / "r18.pth")
    found = read_backbone(tmp_path / "r18.pth")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.fc(found.module(images)), model(images))
    assert (found.arch, found.stem, found.width, found.feature_dim) == ("resnet18", "imagenet", 1, 512)
    assert (found.side, found.mean, found.std) == (224, IMAGENET_MEAN, IMAGENET_STD)


def test_half_precision_becomes_float32(tmp_path: Path, encoder: Encoder) -> None:
    state = {name: t.half() if t.is_floating_point() else t for name, t in encoder.backbone.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "half.safetensors")
    module = read_backbone(tmp_path / "half.safetensors").module
    assert {t.dtype for t in module.state_dict().values()} == {torch.float32, torch.int64}


def test_files_from_before_batch_norm_counted_are_read(tmp_path: Path, encoder: Encoder) -> None:
    state = {n: t for n, t in encoder.backbone.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert_same_features(read_backbone(tmp_path / "old.pth"), encoder)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_known_by_its_shapes(arch: str) -> None:
    stem, width = ("cifar", 0.25) if arch in ("resnet34", "resnext50_32x4d", "wide_resnet50_2") else ("imagenet", 1.0)
    with torch.device("meta"):
        state = build_encoder(arch, width=width, stem=stem).backbone.state_dict()
    assert identify({name: tuple(tensor.shape) for name, tensor in state.items()}) == (arch, stem, width)


# ---- what load_backbone gives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "width", "stem"), [("resnet18", 1, "imagenet"), ("resnet50", 0.5, "cifar")])
def test_the_module_is_torchvisions_alone(tmp_path: Path, arch: str, width: float, stem: str) -> None:
    encoder = trained_encoder(arch, width=width, stem=stem)
    torch.save(encoder.backbone.state_dict(), tmp_path / "b.pth")
    module, preprocess = fastmoco.load_backbone(tmp_path / "b.pth", side=32)
    assert isinstance(module, torchvision.models.ResNet)
    assert {type(part).__module__.split(".")[0] for part in module.modules()} == {"torch", "torchvision"}
    assert any(type(part) is nn.BatchNorm2d for part in module.modules())
    views = preprocess(torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8))
    with torch.no_grad():
        torch.testing.assert_close(module(views), encoder.features(views), rtol=0, atol=1e-3)
    assert b"fastmoco" not in pickle.dumps(module), "a model that people keep whole must load without us"


def test_it_trains_like_any_other_model(tmp_path: Path, encoder: Encoder) -> None:
    torch.save(encoder.backbone.state_dict(), tmp_path / "b.pth")
    module, _ = fastmoco.load_backbone(tmp_path / "b.pth")
    module.train()
    module(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_example_in_the_readme_classifies(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "load_backbone" in block)
    fill(tmp_path / "photos", *(f"{kind}/{i}.png" for kind in ("light", "dark") for i in range(4)))
    for path in tmp_path.glob("photos/*/*.png"):
        noise = np.random.default_rng(int(path.stem)).integers(0, 40, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise + (200 if path.parent.name == "light" else 0)).save(path)
    Image.fromarray(np.full((20, 20, 3), 220, dtype=np.uint8)).save(tmp_path / "new.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("runs/NAME", str(run)), {})
    assert capsys.readouterr().out == "light\n"


# ---- what is refused -------------------------------------------------------------------------------------------------


class Malice:
    """Touches a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def backbone_state(encoder: Encoder) -> dict[str, Tensor]:
    return dict(encoder.backbone.state_dict())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_nothing_executes(tmp_path: Path, encoder: Encoder, zipped: bool) -> None:
    state: dict[str, Any] = backbone_state(encoder) | {"extra": Malice(tmp_path / "executed")}
    torch.save(state, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    assert_same_features(read_backbone(tmp_path / "evil.pth"), encoder)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Malice(tmp_path / "executed")))
    with pytest.raises(CheckpointError):
        read_backbone(tmp_path / "evil.pkl")
    assert not (tmp_path / "executed").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"holds a whole model \(torch\.nn\.modules\.linear\.Linear\)"):
        read_backbone(tmp_path / "model.pt")


def test_a_small_file_that_claims_much_is_refused_before_it_costs_memory(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = build_encoder("resnet152", width=64).backbone.state_dict()
    expanded = {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in state.items()}
    torch.save(expanded, tmp_path / "huge.pth")
    with pytest.raises(CheckpointError, match=r"would take 9\d\d,\d\d\d,\d\d\d,\d\d\d bytes, and the file has"):
        read_backbone(tmp_path / "huge.pth")
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(tmp_path / "huge.pth") as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    with pytest.raises(CheckpointError, match="compressed zip file"):
        read_backbone(packed)


def test_damaged_files_are_refused(tmp_path: Path, encoder: Encoder) -> None:
    """Cut anywhere, or with one bit turned in the tensors, which torch.load would not notice."""
    good = authors_file(tmp_path / "good.pth.tar", encoder).read_bytes()
    old = authors_file(tmp_path / "old.pth.tar", encoder, _use_new_zipfile_serialization=False).read_bytes()
    save_file({n: t.contiguous() for n, t in backbone_state(encoder).items()}, tmp_path / "b.safetensors")
    whole = (tmp_path / "b.safetensors").read_bytes()
    bad = tmp_path / "bad"
    for content, share in itertools.product((good, old, whole), (0.001, 0.5, 0.999)):
        bad.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError) as caught:
            read_backbone(bad)
        assert str(bad) in str(caught.value)
        assert "\n" not in str(caught.value)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    bad.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        read_backbone(bad)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        read_backbone(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"no readable config\.json .* expected the folder of a run"):
        read_backbone(tmp_path)
    for content in (b"", b"<html><body>not found</body></html>"):
        (tmp_path / "page").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"begins with b'.*', expected a safetensors file"):
            read_backbone(tmp_path / "page")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"holds no ResNet: expected names such as .*, found 0"):
        read_backbone(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("layer2.0.conv1.weight", torch.full((16, 8, 3, 3), torch.nan), "are not finite"),
        ("layer2.0.conv1.weight", torch.ones(16, 8, 5, 5), "expected [16, 8, 3, 3]"),
        ("layer2.0.conv1.weight", torch.ones(16, 8, 3, 3, dtype=torch.int8), "as torch.int8"),
        ("layer2.0.bn1.weight", None, "layer2.0.bn1.weight is missing"),
        ("layer2.0.se.weight", torch.ones(3), "'layer2.0.se.weight' is unexpected"),
        ("layer4.2.conv1.weight", torch.ones(3), "(2, 2, 2, 3) basic blocks"),
        ("conv1.weight", torch.ones(9, 3, 3, 3), "has 9 channels"),
        ("conv1.weight", None, "there is no conv1.weight"),
    ],
)
def test_another_architecture_is_refused(
    tmp_path: Path, encoder: Encoder, name: str, value: Tensor | None, said: str
) -> None:
    state = backbone_state(encoder) | {name: value}
    torch.save({n: t for n, t in state.items() if t is not None}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as caught:
        read_backbone(tmp_path / "other.pth")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_asked_for_has_to_be_there(tmp_path: Path, encoder: Encoder) -> None:
    path = authors_file(tmp_path / "a.pth.tar", encoder)
    with pytest.raises(CheckpointError, match="has the arch resnet18, and resnet50 was requested"):
        read_backbone(path, arch="resnet50")
    with pytest.raises(CheckpointError, match="has the stem cifar, and imagenet was requested"):
        read_backbone(path, stem="imagenet")
    with pytest.raises(ConfigError, match="unknown architecture 'resnet19'; did you mean resnet1"):
        read_backbone(path, arch="resnet19")
    with pytest.raises(ConfigError, match="is 4 pixels, expected 8 or more"):
        read_backbone(path, side=4)
    torch.save({"arch": "resnet50", "state_dict": authors_state(encoder)}, path)
    with pytest.raises(CheckpointError, match="its arch is said to be resnet50, its tensors: resnet18"):
        read_backbone(path)


@pytest.mark.parametrize(
    "said", ["{", "[]", "{}", '{"side": true, "mean": [0, 0, 0], "std": [1, 1, 1], "data": null}']
    + [json.dumps({"side": 32, "mean": mean, "std": std, "data": 3}) for mean, std in [("abc", [1, 1, 1]), ([0, 0], 1)]]
    + [json.dumps({"side": 32, "mean": [0, 0, float("inf")], "std": [1, 1, 1], "data": None})]
    + [json.dumps({"side": 32, "mean": [0, 0, 0], "std": [1, 0, 1], "data": None})],
)  # fmt: skip
def test_an_unreadable_record_is_refused(tmp_path: Path, encoder: Encoder, said: str) -> None:
    state = {n: t.contiguous() for n, t in backbone_state(encoder).items()}
    save_file(state, tmp_path / "b.safetensors", {RECORD: said})
    with pytest.raises(CheckpointError, match="says how images were prepared, but not readably"):
        read_backbone(tmp_path / "b.safetensors")
