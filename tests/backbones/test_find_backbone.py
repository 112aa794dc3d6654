"""Which of several backbones is taken, and what is said of files without one that can be."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmoco import load_backbone
from fastmoco.backbones.read import read_backbone
from fastmoco.cli import main
from fastmoco.errors import CheckpointError, ConfigError, ExitCode
from tests.backbones.test_other_trainers import assert_same, resnet, under


def refusal(path: Path, content: Any, **options: Any) -> str:
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        read_backbone(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path} ")


def test_different_ones_of_the_same_rank_are_a_question(tmp_path: Path) -> None:
    first, second = resnet(0), resnet(1)
    both = under("left.net.", first) | under("right.net.", second)
    assert refusal(tmp_path / "a.pth", both) == (
        "has several backbones, below left.net and right.net: choose one with --prefix left.net"
    )
    assert_same(read_backbone(tmp_path / "a.pth", prefix="right"), second)
    module, _ = load_backbone(tmp_path / "a.pth", prefix="left.net")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(module(images), first(images))
    assert (
        refusal(tmp_path / "a.pth", both, prefix="ri") == "has no backbone below 'ri', but below left.net and right.net"
    )


def test_the_other_one_is_exported_when_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = resnet(0), resnet(1)
    torch.save({"state_dict": under("encoder_q.", first) | under("encoder_k.", second)}, tmp_path / "a.pth")
    for prefix, model in (([], first), (["--prefix", "encoder_k"], second)):
        out = tmp_path / f"{len(prefix)}.safetensors"
        assert (
            main(["export", str(tmp_path / "a.pth"), "--to", "safetensors", "-o", str(out), *prefix]) == ExitCode.DONE
        )
        assert_same(read_backbone(out), model)
    assert "(state_dict.encoder_k)" in "".join(capsys.readouterr().out.split())
    arguments = ["export", str(tmp_path / "a.pth"), "--to", "safetensors", "-o", str(tmp_path / "b.safetensors")]
    assert main([*arguments, "--prefix", "."]) == ExitCode.CONFIG


def test_equal_ones_are_no_question(tmp_path: Path) -> None:
    model = resnet(0)
    shared = {f"{prefix}.{name}": t for prefix in ("left", "right") for name, t in model.state_dict().items()}
    torch.save(shared, tmp_path / "shared.pth")
    torch.save(under("left.", model) | under("right.", model), tmp_path / "copied.pth")
    for name in ("shared", "copied"):
        assert_same(read_backbone(tmp_path / f"{name}.pth"), model)


def test_a_whole_one_is_taken_before_an_incomplete_one(tmp_path: Path) -> None:
    half = {name: tensor for name, tensor in under("student.", resnet(0)).items() if "layer4" not in name}
    model = resnet(1)
    torch.save(half | under("teacher.", model), tmp_path / "a.pth")
    assert_same(read_backbone(tmp_path / "a.pth"), model)


def changed(*, add: dict[str, Tensor] | None = None, drop: str = "nothing") -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in under("net.", resnet(0)).items() if drop not in name}
    return state | {f"net.{name}": tensor for name, tensor in (add or {}).items()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (changed(add={"conv1.0.weight": torch.ones(8, 3, 3, 3)}, drop="net.conv1."), "below net: it is a ResNet"),
        (changed(add={"conv2.weight": torch.ones(8, 8, 3, 3)}), "it is a ResNet with a deep stem"),
        (changed(add={"stem.0.weight": torch.ones(8, 3, 3, 3)}, drop="net.conv1."), "it is a ResNet with a deep stem"),
        (changed(add={"layer1.0.se.fc1.weight": torch.ones(1)}), "it is a ResNet with squeeze-and-excitation"),
        (changed(add={"attnpool.k_proj.weight": torch.ones(1)}), "it is a ResNet with attention pooling"),
        (changed(add={"layer2.0.downsample.2.weight": torch.ones(1)}), "(ResNet-D)"),
        (changed(add={"layer5.0.conv1.weight": torch.ones(1)}), "'layer5.0.conv1.weight' is unexpected"),
        (changed(drop="running_"), "its normalisation is not batch norm"),
        (changed(drop="net.conv1."), "there is no conv1.weight"),
        ({"model": {"patch_embed.proj.weight": torch.ones(1)}}, "holds a vision transformer, and fastmoco has ResNets"),
        ({"stages.0.blocks.0.conv_dw.weight": torch.ones(1)}, "holds a ConvNeXt"),
        ({"stages.0.blocks.0.conv1.weight": torch.ones(1)}, "ResNet of pre-activation blocks (ResNetV2)"),
        ({"_fsdp_wrapped_module.flat_param": torch.ones(1)}, "holds flattened parameters of FSDP"),
        ({"state_dict": {}, "epoch": 3}, "found no tensors"),
        ({"model": nn.Linear(2, 2)}, "could run code: save its weights with torch.save(model.state_dict(), ...)"),
    ],
)  # fmt: skip
def test_what_is_no_backbone_is_named(tmp_path: Path, content: Any, said: str) -> None:
    assert said in refusal(tmp_path / "a.pth", content)


def test_a_whole_model_of_older_files_is_named_too(tmp_path: Path) -> None:
    torch.save(resnet(0), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"a whole model \(torchvision\.models\.resnet\.ResNet\)"):
        read_backbone(tmp_path / "a.pth")


def test_a_folder_of_others_asks_for_a_file_in_it(tmp_path: Path) -> None:
    """As Hugging Face's hub keeps a model."""
    (tmp_path / "config.json").write_text('{"architectures": ["ResNetModel"]}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"not the folder of a run: name a file in it \(model\.safetensors\)"):
        read_backbone(tmp_path)


def test_torchscript_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"model/{name}", "")
    with pytest.raises(CheckpointError, match="it is a TorchScript archive"):
        read_backbone(tmp_path / "a.pt")
