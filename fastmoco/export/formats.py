"""What other libraries call the parts of a ResNet, and how they load them.

    target        file                names of the tensors
    torchvision   .pth .safetensors   torchvision's, without fc
    timm          .pth .safetensors   timm's, which for these ResNets are torchvision's
    lincls        .pth.tar .pth       module.encoder_q.*, for main_lincls.py of facebookresearch/moco
    detectron2    .pkl                stem.conv1.*, res2.0.conv1.norm.* and so on, NumPy arrays
    safetensors   .safetensors        torchvision's, and how images are to be prepared
    onnx          .onnx               images (batch, 3, S, S) → features (batch, D), for any batch

All hold the backbone only, in float32.

B batch · S side of a view · D features
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from fastmoco.export.read import RECORD, LoadedBackbone, read_backbone, record
from fastmoco.model.resnet import SHAPES, set_cifar_stem
from fastmoco.registry import EXPORT_TARGETS
from fastmoco.run.sealed import sealed_bytes
from pipelines.errors import BackendMissingError
from pipelines.registry import load

State = dict[str, Tensor]
Model = Callable[[Tensor], Tensor]  # (B, 3, S, S) → (B, D)

_LINCLS = "module.encoder_q."
_CLASSIFIER = ["fc.bias", "fc.weight"]
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_GROUPS_AND_WIDTH = {"torchvision": ("groups", "width_per_group"), "timm": ("cardinality", "base_width")}


class Format(NamedTuple):
    """How a library's file is made and read back.

    write                (backbone, name of the file) → its bytes
    load                 (backbone, path) → the model that the library makes of it, and who that was, for people
    only_resnets, only_width_1, only_imagenet_stem, only_by_name   what the library builds: no other backbones, no
                         other widths, no other stem, none that torchvision has no name for
    """

    write: Callable[[LoadedBackbone, str], bytes]
    load: Callable[[LoadedBackbone, Path], tuple[Model, str]]
    only_resnets: bool = True
    only_width_1: bool = True
    only_imagenet_stem: bool = False
    only_by_name: bool = False

    def refusal(self, backbone: LoadedBackbone) -> str:
        """Of what kind this backbone is that the library does not build; empty where it builds it."""
        if self.only_resnets and backbone.arch not in SHAPES:
            return backbone.arch
        if self.only_width_1 and backbone.width != 1:
            return f"{backbone.arch} with width {backbone.width:g}"
        if self.only_imagenet_stem and backbone.stem == "cifar":
            return f"{backbone.arch} with the CIFAR stem"
        if self.only_by_name and not _named(backbone.arch):
            return f"{backbone.arch}, for which torchvision has no name"
        return ""


def _state(backbone: LoadedBackbone) -> State:
    return dict(backbone.module.state_dict())


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _version(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"


# ---- torchvision, timm, safetensors ----------------------------------------------------------------------------------


def _write_state(backbone: LoadedBackbone, name: str) -> bytes:
    if name.lower().endswith(".safetensors"):
        return sealed_bytes(_state(backbone), {"format": "pt", RECORD: record(backbone)})
    return _saved(_state(backbone))


def _read_state(path: Path) -> State:
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return torch.load(path, map_location="cpu", weights_only=True)
    return safetensors.torch.load_file(path)


def _named(arch: str) -> bool:
    """Whether torchvision and timm, whose names for these ResNets are the same, have one for this architecture."""
    return arch in torchvision.models.list_models()


def call_in(library: str, arch: str) -> tuple[str, dict[str, Any]]:
    """The name and the options by which torchvision or timm builds an architecture.

    What they have no name for is the plain ResNet of the same blocks, with the groups and the width as options.
    """
    if _named(arch):
        return arch, {}
    shape = SHAPES[arch]
    plain = shape._replace(groups=1, width_per_group=64)
    name = next(name for name, other in SHAPES.items() if other == plain)
    return name, dict(zip(_GROUPS_AND_WIDTH[library], (shape.groups, shape.width_per_group), strict=True))


def model_in(library: str, arch: str) -> nn.Module:
    """torchvision's or timm's own model of an architecture: classifier, ImageNet stem, random weights."""
    name, options = call_in(library, arch)
    if library == "torchvision":
        return torchvision.models.get_model(name, **options)
    import timm

    return timm.create_model(name, **options)


def _filled(library: str, backbone: LoadedBackbone, state: State) -> Model:
    """The library's model with these weights; only its classifier may be missing."""
    with torch.device("meta"):  # without weights of its own: whatever the file lacks, but for fc, cannot be computed
        model = model_in(library, backbone.arch)
        if backbone.stem == "cifar":
            set_cifar_stem(model)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert sorted(missing) == _CLASSIFIER, missing
    assert unexpected == [], unexpected
    model.fc = nn.Identity()
    return model.eval()


def _load_torchvision(backbone: LoadedBackbone, path: Path) -> tuple[Model, str]:
    return _filled("torchvision", backbone, _read_state(path)), _version("torchvision")


def _load_timm(backbone: LoadedBackbone, path: Path) -> tuple[Model, str]:
    if importlib.util.find_spec("timm") is None:
        return _filled("torchvision", backbone, _read_state(path)), "torchvision (timm is not installed)"
    return _filled("timm", backbone, _read_state(path)), _version("timm")


def _load_safetensors(backbone: LoadedBackbone, path: Path) -> tuple[Model, str]:
    return read_backbone(path, arch=backbone.arch, stem=backbone.stem).module, "fastmoco.load_backbone"


# ---- main_lincls.py --------------------------------------------------------------------------------------------------


def _write_lincls(backbone: LoadedBackbone, name: str) -> bytes:
    state = {_LINCLS + name: tensor for name, tensor in _state(backbone).items()}
    return _saved({"arch": backbone.arch, "state_dict": state, RECORD: record(backbone)})


def _load_lincls(backbone: LoadedBackbone, path: Path) -> tuple[Model, str]:
    """main_lincls.py takes the names below module.encoder_q, but not those of the head, into torchvision's model."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    taken = {
        name.removeprefix(_LINCLS): tensor
        for name, tensor in state.items()
        if name.startswith(_LINCLS) and not name.startswith(_LINCLS + "fc")
    }
    return _filled("torchvision", backbone, taken), f"{_version('torchvision')}, as in main_lincls.py"


# ---- detectron2 ------------------------------------------------------------------------------------------------------

_DETECTRON2_NAME = re.compile(
    r"(stem|res[2-5]\.\d+)\.(conv[1-3]|shortcut)(\.norm\.(weight|bias|running_mean|running_var|num_batches_tracked)"
    r"|\.weight)"
)


def detectron2_name(name: str) -> str:
    """torchvision's name of a tensor to detectron2's: layer1.0.bn2.weight → res2.0.conv2.norm.weight."""
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = name if name.startswith("res") else "stem." + name
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _write_detectron2(backbone: LoadedBackbone, name: str) -> bytes:
    """What detectron2's checkpointer takes for a model of other hands: a pickle of a dict of NumPy arrays.

    In protocol 3 and under NumPy's older module name, the file loads with every NumPy since 1.17.
    """
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in _state(backbone).items()}
    content = {"model": arrays, "__author__": "fastmoco", "matching_heuristics": True}
    return pickle.dumps(content, protocol=3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)


def detectron2_settings(backbone: LoadedBackbone) -> dict[str, str | int | list[float]]:
    """What a config of detectron2 has to say for this backbone to be built, fed and fine-tuned as a whole.

    By default detectron2 keeps the first stages and all statistics of batch norm as they are, and has the stride in
    the first convolution of a bottleneck, unlike torchvision. FREEZE_AT 0 and a batch norm across GPUs are of the
    authors' detection/configs.
    """
    shape = SHAPES[backbone.arch]
    convolutions = 2 if shape.expansion == 1 else 3  # in a block
    return {
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": convolutions * sum(shape.layers) + 2,
        "MODEL.RESNETS.NUM_GROUPS": shape.groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": shape.width_per_group,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 * shape.expansion,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NORM": "SyncBN",
        "MODEL.PIXEL_MEAN": [round(255 * value, 4) for value in backbone.mean],
        "MODEL.PIXEL_STD": [round(255 * value, 4) for value in backbone.std],
        "INPUT.FORMAT": "RGB",
    }


def _load_detectron2(backbone: LoadedBackbone, path: Path) -> tuple[Model, str]:
    """The file's structure, and its arrays under torchvision's names again."""
    content = pickle.loads(path.read_bytes())  # our own bytes of a moment ago
    assert content["matching_heuristics"] is True
    assert content["__author__"]
    arrays = content["model"]
    assert all(_DETECTRON2_NAME.fullmatch(name) for name in arrays), sorted(arrays)
    back = {detectron2_name(name): name for name in _state(backbone)}
    state = {back[name]: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return _filled("torchvision", backbone, state), f"{_version('torchvision')}; detectron2 was not run"


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def _write_onnx(backbone: LoadedBackbone, name: str) -> bytes:
    missing = [package for package in _ONNX if importlib.util.find_spec(package) is None]
    if missing:
        raise BackendMissingError(
            f"--to onnx needs {', '.join(missing)}, which is not installed: uv sync --extra onnx, or "
            f"pip install {' '.join(_ONNX)}"
        )
    example = torch.zeros(2, 3, backbone.side, backbone.side)  # of 2: an axis of 1 would become a constant
    program = torch.onnx.export(
        backbone.module,
        (example,),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[RECORD] = record(backbone)
    return program.model_proto.SerializeToString()


def _load_onnx(backbone: LoadedBackbone, path: Path) -> tuple[Model, str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images, features = session.get_inputs()[0], session.get_outputs()[0]
    assert (images.name, features.name) == ("images", "features")
    assert images.shape[1:] == [3, backbone.side, backbone.side]

    def model(x: Tensor) -> Tensor:
        halves = [session.run(["features"], {"images": part.numpy()})[0] for part in x.split([len(x) - 1, 1])]
        return torch.cat([torch.from_numpy(half) for half in halves])  # two sizes of batch

    return model, _version("onnxruntime")


TORCHVISION = Format(_write_state, _load_torchvision)
TIMM = Format(_write_state, _load_timm)
DETECTRON2 = Format(_write_detectron2, _load_detectron2, only_imagenet_stem=True)
LINCLS = Format(_write_lincls, _load_lincls, only_imagenet_stem=True, only_by_name=True)
SAFETENSORS = Format(_write_state, _load_safetensors, only_resnets=False, only_width_1=False)
ONNX = Format(_write_onnx, _load_onnx, only_resnets=False, only_width_1=False)


def format_of(target: str) -> Format:
    """The format of a key of `fastmoco.registry.EXPORT_TARGETS`."""
    return load(EXPORT_TARGETS[target].format)
