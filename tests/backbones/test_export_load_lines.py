"""What `fastmoco export` says to load a file with does load it: every architecture in every library, or one line."""

from __future__ import annotations

import ast
import functools
import itertools
import pickle
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from fastmoco.backbones.detectron2 import detectron2_name
from fastmoco.backbones.formats import model_in
from fastmoco.backbones.read import LoadedBackbone
from fastmoco.backbones.write import export
from fastmoco.commands.export import load_lines
from fastmoco.errors import ConfigError
from fastmoco.model.encoder import feature_dim
from fastmoco.model.resnet import ResNetFamily
from fastmoco.registry import ARCHITECTURES, EXPORT_TARGETS
from pipelines.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from tests.backbones.test_read import trained_encoder

SIDE = 32
QUICK = ("resnet18", "resnext50_32x8d")
SUFFIX = {"torchvision": "pth", "timm": "safetensors", "detectron2": "pkl", "lincls": "pth.tar", "onnx": "onnx"}


def around(module: nn.Module, arch: str, stem: str = "imagenet") -> LoadedBackbone:
    return LoadedBackbone(
        module=module.eval(),
        arch=arch,
        stem=stem,
        width=1,
        feature_dim=feature_dim(arch, 1),
        side=SIDE,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        origin="random",
        data=None,
    )


@functools.lru_cache(maxsize=1)  # the largest takes half a gigabyte
def random_backbone(arch: str) -> LoadedBackbone:
    """With the statistics of a batch, so that a batch norm which was not loaded would show."""
    module = ResNetFamily.build(arch)
    module.load_state_dict(trained_encoder(arch, width=1, stem="imagenet").backbone.state_dict())
    return around(module, arch)


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


# ---- detectron2, as far as a backbone is concerned -------------------------------------------------------------------


def convolution(inputs: int, outputs: int, side: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    layer.add_module("norm", nn.BatchNorm2d(outputs))
    return layer


def normalised(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.get_submodule("norm")(layer(x))


class Detectron2Block(nn.Module):
    """BasicBlock below depth 50, else BottleneckBlock."""

    def __init__(self, inputs: int, outputs: int, bottleneck: int, stride: int, settings: dict[str, Any]) -> None:
        super().__init__()
        if settings["MODEL.RESNETS.DEPTH"] < 50:
            layers = [convolution(inputs, outputs, 3, stride), convolution(outputs, outputs, 3)]
        else:
            strides = (stride, 1) if settings["MODEL.RESNETS.STRIDE_IN_1X1"] else (1, stride)
            groups = settings["MODEL.RESNETS.NUM_GROUPS"]
            layers = [convolution(inputs, bottleneck, 1, strides[0])]
            layers += [convolution(bottleneck, bottleneck, 3, strides[1], groups)]
            layers += [convolution(bottleneck, outputs, 1)]
        self.names = [f"conv{n + 1}" for n in range(len(layers))]
        for name, layer in zip(self.names, layers, strict=True):
            self.add_module(name, layer)
        self.shortcut = convolution(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else normalised(self.shortcut, x)
        for name in self.names[:-1]:
            x = normalised(self.get_submodule(name), x).relu()
        return (normalised(self.get_submodule(self.names[-1]), x) + identity).relu()


class Detectron2Backbone(nn.Module):
    """What detectron2's build_resnet_backbone makes of these settings, and its preparation of pixels from 0 to 255."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
        assert settings["INPUT.FORMAT"] == "RGB"
        self.mean, self.std = settings["MODEL.PIXEL_MEAN"], settings["MODEL.PIXEL_STD"]
        self.stem = nn.ModuleDict({"conv1": convolution(3, 64, 7, 2)})
        inputs, outputs = 64, settings["MODEL.RESNETS.RES2_OUT_CHANNELS"]
        bottleneck = settings["MODEL.RESNETS.NUM_GROUPS"] * settings["MODEL.RESNETS.WIDTH_PER_GROUP"]
        for n, count in enumerate(blocks[settings["MODEL.RESNETS.DEPTH"]]):
            stage = nn.Sequential()
            for m in range(count):
                stride = 2 if n > 0 and m == 0 else 1
                stage.append(Detectron2Block(inputs, outputs, bottleneck, stride, settings))
                inputs = outputs
            self.add_module(f"res{n + 2}", stage)
            outputs, bottleneck = 2 * outputs, 2 * bottleneck

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)
        x = nn.functional.max_pool2d(normalised(self.stem["conv1"], x).relu(), 3, 2, 1)
        for n in range(2, 6):
            x = self.get_submodule(f"res{n}")(x)
        return x.mean(dim=(2, 3))


def settings_of(line: str) -> dict[str, Any]:
    """The words after train_net.py as detectron2 takes them: Python's literals, and what is none is text."""
    words = shlex.split(line)
    settings: dict[str, Any] = {}
    for key, value in zip(words[::2], words[1::2], strict=True):
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return settings


# ---- which model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_librarys_model_has_the_tensors_of_every_architecture(library: str, arch: str) -> None:
    with torch.device("meta"):
        model, ours = model_in(library, arch), ResNetFamily.build(arch)
    model.fc = nn.Identity()
    assert isinstance(model, {"torchvision": torchvision.models.ResNet, "timm": timm.models.ResNet}[library])
    assert shapes_of(model) == shapes_of(ours)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_settings_of_detectron2_have_the_tensors_of_every_architecture(arch: str) -> None:
    with torch.device("meta"):
        backbone = around(ResNetFamily.build(arch), arch)
        model = Detectron2Backbone(settings_of(load_lines(backbone, "detectron2", "b.pkl")))
    assert shapes_of(model) == {detectron2_name(name): shape for name, shape in shapes_of(backbone.module).items()}


# ---- what is printed -------------------------------------------------------------------------------------------------

TORCHVISION, TIMM = "import torch, torchvision; model = torchvision.models.", "import torch, timm; model = timm."
LOAD = "; model.load_state_dict(torch.load('b.pth'), strict=False)"


@pytest.mark.parametrize(
    ("arch", "target", "line"),
    [
        ("resnet18", "torchvision", f"{TORCHVISION}resnet18(){LOAD}"),
        ("resnext50_32x4d", "torchvision", f"{TORCHVISION}resnext50_32x4d(){LOAD}"),
        ("resnext50_32x8d", "torchvision", f"{TORCHVISION}resnet50(groups=32, width_per_group=8){LOAD}"),
        (
            "resnet18",
            "timm",
            "import timm; model = timm.create_model('resnet18', checkpoint_path='b.pth', num_classes=0)",
        ),
        ("resnext50_32x8d", "timm", f"{TIMM}create_model('resnet50', cardinality=32, base_width=8){LOAD}"),
    ],
)
def test_the_line_in_python(arch: str, target: str, line: str) -> None:
    assert load_lines(around(nn.Identity(), arch), target, "b.pth") == line


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("resnet34", (34, 1, 64, 64)),
        ("resnet50", (50, 1, 64, 256)),
        ("resnext101_32x8d", (101, 32, 8, 256)),
        ("wide_resnet50_2", (50, 1, 128, 256)),
    ],
)
def test_the_settings_of_detectron2(arch: str, said: tuple[int, ...]) -> None:
    settings = settings_of(load_lines(around(nn.Identity(), arch), "detectron2", "my b.pkl"))
    names = ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS")
    assert settings == {
        "MODEL.WEIGHTS": "my b.pkl",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        **{f"MODEL.RESNETS.{name}": value for name, value in zip(names, said, strict=True)},
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NORM": "SyncBN",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
    }


# ---- what it loads ---------------------------------------------------------------------------------------------------


def as_printed(line: str, target: str) -> nn.Module:
    """The model that somebody has who does what the line says, its classifier taken off."""
    if target == "detectron2":
        settings = settings_of(line)
        arrays = pickle.loads(Path(settings["MODEL.WEIGHTS"]).read_bytes())["model"]
        model = Detectron2Backbone(settings)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return model
    if target == "lincls":
        words = shlex.split(line)
        assert words[:3] == ["python", "main_lincls.py", "-a"]
        model = torchvision.models.__dict__[words[3]]()
        state = torch.load(words[5])["state_dict"]
        model.load_state_dict({n.removeprefix("module.encoder_q."): t for n, t in state.items()}, strict=False)
    else:
        names: dict[str, Any] = {}
        exec(line, names)
        if target == "safetensors":
            return names["backbone"]
        model = names["model"]
    model.fc = nn.Identity()
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied afterwards: the files of all these tests together are gigabytes."""
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


CASES = [  # by architecture, so that each is made once
    pytest.param(arch, target, marks=[pytest.mark.slow] if arch not in QUICK or target == "onnx" else [])
    for arch, target in itertools.product((*QUICK, "wide_resnet50_2"), EXPORT_TARGETS)
    if target != "onnx" or arch in QUICK  # which takes longest
]


@pytest.mark.parametrize(("arch", "target"), CASES)
@torch.no_grad()
def test_a_file_loads_as_is_printed_or_is_refused(
    folder: Path, arch: str, target: str, require_backend: Callable[[str], None]
) -> None:
    if target == "onnx":
        require_backend("onnx")
    backbone, path = random_backbone(arch), folder / f"it's {arch}.{SUFFIX.get(target, target)}"
    if (arch, target) == ("resnext50_32x8d", "lincls"):
        with pytest.raises(ConfigError) as caught:
            export(backbone, target, path)
        expected = "lincls builds no resnext50_32x8d, for which torchvision has no name: use --to torchvision or timm"
        assert str(caught.value).startswith(expected)
        assert "\n" not in str(caught.value)
        assert list(folder.iterdir()) == []
        return
    export(backbone, target, path)
    line = load_lines(backbone, target, str(path))
    pixels = torch.randint(0, 256, (4, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(7)).float()
    batch = (pixels / 255 - torch.tensor(backbone.mean).view(3, 1, 1)) / torch.tensor(backbone.std).view(3, 1, 1)
    if target == "onnx":
        names: dict[str, Any] = {"batch": batch.numpy()}
        exec(line, names)
        found = torch.from_numpy(names["features"])
    else:
        found = as_printed(line, target).eval()(pixels if target == "detectron2" else batch)
    expected = backbone.module(batch)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
