"""ResNets are read from the files of other trainers, laid out as those trainers lay them out."""

from __future__ import annotations

import argparse
import datetime
import pickle
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmoco.backbones.formats import DETECTRON2
from fastmoco.backbones.read import LoadedBackbone, read_backbone, read_init
from fastmoco.backbones.write import export
from fastmoco.errors import CheckpointError, ConfigError
from fastmoco.model.architectures import family

State = dict[str, Tensor]
Layout = Callable[[nn.Module, nn.Module], Any]  # (query or only backbone, key) → what is saved

IDENTITY = torch.eye(3)


def resnet(seed: int, arch: str = "resnet18", stem: str = "imagenet") -> nn.Module:
    """In evaluation, every tensor of it different from its initial value."""
    torch.manual_seed(seed)
    model = family(arch).build(arch, width=0.125, stem=stem).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return model


def assert_same(found: LoadedBackbone, model: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        features = found.module(images)
        assert features.std() > 0.01
        assert torch.equal(features, model(images))


def under(prefix: str, model: nn.Module) -> State:
    return {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}


def numbered(model: nn.Module, leave_out: tuple[str, ...] = ("fc",)) -> nn.Sequential:
    return nn.Sequential(*(child for name, child in model.named_children() if name not in leave_out))


def head(prefix: str) -> State:
    return {f"{prefix}.0.weight": IDENTITY, f"{prefix}.1.running_mean": torch.zeros(3)}


def fairscale_wrapped(model: nn.Module) -> State:
    return {re.sub(r"^(layer\d\.\d)", r"\1._fsdp_wrapped_module", n): t for n, t in under("", model).items()}


def transformers_names(model: nn.Module) -> State:
    """As ResNetModel of Hugging Face transformers."""
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] in ("conv1", "bn1"):
            new = f"embedder.embedder.{'convolution' if parts[0] == 'conv1' else 'normalization'}.{parts[1]}"
        else:
            stage, block, module, *rest = parts
            new = f"encoder.stages.{int(stage[-1]) - 1}.layers.{block}."
            if module == "downsample":
                new += f"shortcut.{('convolution', 'normalization')[int(rest[0])]}.{rest[1]}"
            else:
                kind = "convolution" if module.startswith("conv") else "normalization"
                new += f"layer.{int(module[-1]) - 1}.{kind}.{rest[0]}"
        state["resnet." + new] = tensor
    return state | {"classifier.1.weight": torch.zeros(10, 64)}


LAYOUTS: dict[str, Layout] = {
    "moco-v3": lambda q, k: {
        "arch": "resnet18",
        "state_dict": under("module.base_encoder.", q) | under("module.momentum_encoder.", k) | head("module.pred"),
        "scaler": {"scale": 65536.0},
    },
    "simsiam": lambda q, k: {"state_dict": under("module.encoder.", q) | head("module.encoder.fc")},
    "byol, lucidrains": lambda q, k: under("online_encoder.net.", q) | under("target_encoder.net.", k),
    "byol, sthalles": lambda q, k: {
        "target_network_state_dict": under("encoder.", numbered(k)) | head("projetion.net"),
        "online_network_state_dict": under("encoder.", numbered(q)) | head("projetion.net"),
        "optimizer_state_dict": {},
    },
    "solo-learn": lambda q, k: {
        "state_dict": under("backbone.", q) | under("momentum_backbone.", k) | head("projector"),
        "hyper_parameters": argparse.Namespace(lr=0.3, started=datetime.date(2024, 1, 1)),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": Path("last.ckpt")}},
        "lr_schedulers": [{"base_lrs": [0.3], "_step_count": 3}],
    },
    "mmselfsup": lambda q, k: {
        "meta": {"config": "model = dict()", "seed": 0},
        "state_dict": OrderedDict(under("backbone.", q) | under("encoder_k.module.0.", k) | head("neck.mlp")),
    },
    "mmselfsup byol": lambda q, k: {"state_dict": under("backbone.", q) | under("target_net.module.0.", k)},
    "openselfsup": lambda q, k: {
        "state_dict": under("encoder_q.0.", q) | under("encoder_k.0.", k) | under("backbone.", q)
    },
    "lightly moco": lambda q, k: {
        "state_dict": under("backbone.", numbered(q)) | under("backbone_momentum.", numbered(k)),
        "hyper_parameters": defaultdict(list, {"lr": [1]}),
    },
    "lightly dino": lambda q, k: under("teacher_backbone.", numbered(k)) | under("student_backbone.", numbered(q)),
    "dino": lambda q, k: {
        "student": under("module.backbone.", q) | head("module.head.mlp"),
        "teacher": under("backbone.", k) | head("head.mlp"),
        "arch": "an architecture that fastmoco does not have",
        "args": argparse.Namespace(arch="resnet50", out_dim=65536),
    },
    "vicreg": lambda q, k: {"epoch": 1, "model": under("module.backbone.", q) | head("module.projector")},
    "swav": lambda q, k: under("module.", q) | head("module.projection_head") | {"module.prototypes.weight": IDENTITY},
    "barlow twins": lambda q, k: {"model": under("module.backbone.", q) | head("module.projector")},
    "simclr, sthalles": lambda q, k: {"state_dict": under("backbone.", q) | head("backbone.fc")},
    "supcon": lambda q, k: {
        "opt": argparse.Namespace(),
        "model": {n.replace(".downsample.", ".shortcut."): t for n, t in under("encoder.module.", q).items()},
    },
    "timm": lambda q, k: {"arch": "resnet18", "state_dict": under("", q), "state_dict_ema": under("", k), "version": 2},
    "torchvision references": lambda q, k: {"model": under("", q), "model_ema": under("module.", k), "args": Path()},
    "torch.compile inside ddp": lambda q, k: {"net": under("module._orig_mod.", q)},
    "torch.compile of parts": lambda q, k: {n.replace(".bn2", ".bn2._orig_mod"): t for n, t in under("", q).items()},
    "fsdp": lambda q, k: {"model": fairscale_wrapped(q)},
    "vissl": lambda q, k: {
        "phase_idx": 99,
        "classy_state_dict": {
            "base_model": {"model": {"trunk": under("_feature_blocks.", q), "heads": head("0.clf")}},
            "loss": {"moco_encoder": {"trunk": under("_feature_blocks.", k)}},
        },
    },
    "transformers": lambda q, k: transformers_names(q),
    "nested by module": lambda q, k: {"a": {"b": {"c": {"d": {"e": {"f": under("", q)}}}}}},
    "parameters": lambda q, k: {n: nn.Parameter(t, False) for n, t in under("", q).items() if t.is_floating_point()},
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_query_side_of_each_layout(tmp_path: Path, name: str, zipped: bool) -> None:
    query, key = resnet(0), resnet(1)
    torch.save(LAYOUTS[name](query, key), tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    found = read_backbone(tmp_path / "file.pth")
    assert (found.arch, found.stem, found.width) == ("resnet18", "imagenet", 0.125)
    assert_same(found, query)


@pytest.mark.parametrize(
    ("name", "prefix", "said"),
    [
        ("moco-v3", "momentum_encoder", "state_dict.module.momentum_encoder, not state_dict.module.base_encoder"),
        ("dino", "teacher", "teacher.backbone"),
        ("timm", "state_dict_ema", "state_dict_ema"),
        ("vissl", "loss.moco_encoder", "classy_state_dict.loss.moco_encoder.trunk._feature_blocks"),
        ("byol, lucidrains", ".target_encoder.net.", "target_encoder.net"),
    ],
)
def test_the_other_side_is_taken_when_chosen(tmp_path: Path, name: str, prefix: str, said: str) -> None:
    key = resnet(1)
    torch.save(LAYOUTS[name](resnet(0), key), tmp_path / "file.pth")
    found = read_backbone(tmp_path / "file.pth", prefix=prefix)
    assert_same(found, key)
    assert found.origin == f"{tmp_path / 'file.pth'} ({said.split(',')[0]})"


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("arch", ["resnet50", "resnext50_32x8d", "wide_resnet50_2"])
def test_children_by_number_of_deeper_ones(tmp_path: Path, arch: str, stem: str) -> None:
    model = resnet(0, arch, stem)
    torch.save({"state_dict": numbered(model).state_dict()}, tmp_path / "file.pth")
    found = read_backbone(tmp_path / "file.pth")
    assert (found.arch, found.stem) == (arch, stem)
    assert_same(found, model)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("left_out", [("relu", "maxpool"), ("maxpool",)])
def test_children_without_relu_or_pooling_compute_what_they_did(
    tmp_path: Path, stem: str, left_out: tuple[str, ...]
) -> None:
    """lightly's ResNet for CIFAR applies its first ReLU as a function, which a Sequential of its children lacks."""
    sequence = numbered(resnet(0, stem=stem), (*left_out, "fc")).append(nn.Flatten())
    torch.save({"state_dict": under("f.", sequence) | head("g")}, tmp_path / "file.pth")
    found = read_backbone(tmp_path / "file.pth")
    assert_same(found, sequence)
    expected = tuple(name for name in left_out if name == "relu" or stem == "imagenet")
    assert found.without == expected
    assert found.origin.endswith(f"(without {' and '.join(expected)})" if expected else ".pth")
    if expected:
        with pytest.raises(CheckpointError, match=r"is of a network without .* before layer1, and training has both"):
            read_init(str(tmp_path / "file.pth"))
        with pytest.raises(ConfigError, match=r"safetensors builds no resnet18 without .*: use --to onnx"):
            export(found, "safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = resnet(0)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in under("backbone.", model).items()}
    torch.save(state, tmp_path / "file.pth")
    save_file(state, tmp_path / "file.safetensors")
    model.to(dtype).float()
    for name in ("file.pth", "file.safetensors"):
        assert_same(read_backbone(tmp_path / name), model)


def test_tensors_that_share_a_storage(tmp_path: Path) -> None:
    """Flattened for a collective, saved as views."""
    model = resnet(0)
    tensors = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    flat = torch.cat([t.reshape(-1) for t in tensors.values()])
    pieces = flat.split([t.numel() for t in tensors.values()])
    state = {n: piece.view(t.shape) for (n, t), piece in zip(tensors.items(), pieces, strict=True)}
    for zipped in (True, False):
        torch.save(state, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
        assert_same(read_backbone(tmp_path / "file.pth"), model)


def test_what_is_exported_for_detectron2_is_read_back(tmp_path: Path) -> None:
    model = resnet(0, "resnet50")
    torch.save(model.state_dict(), tmp_path / "file.pth")
    content = DETECTRON2.write(read_backbone(tmp_path / "file.pth"), "file.pkl")
    (tmp_path / "file.pkl").write_bytes(content)
    assert_same(read_backbone(tmp_path / "file.pkl"), model)
    arrays = pickle.loads(content)["model"]
    (tmp_path / "newer.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=4))
    assert_same(read_backbone(tmp_path / "newer.pkl"), model)


def test_safetensors_of_others(tmp_path: Path) -> None:
    query, key = resnet(0), resnet(1)
    save_file(under("model.encoder_k.", key) | under("model.encoder_q.", query), tmp_path / "two.safetensors")
    save_file(transformers_names(query), tmp_path / "hub.safetensors", {"format": "pt"})
    for name in ("two", "hub"):
        assert_same(read_backbone(tmp_path / f"{name}.safetensors"), query)
    assert_same(read_backbone(tmp_path / "two.safetensors", prefix="encoder_k"), key)
