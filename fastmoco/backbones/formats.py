"""What other libraries call the parts of a ResNet, and how they load them.

    target        file                names of the tensors
    torchvision   .pth .safetensors   torchvision's, without fc
    timm          .pth .safetensors   timm's, which for these ResNets are torchvision's
    lincls        .pth.tar .pth       module.encoder_q.*, for main_lincls.py of facebookresearch/moco
    detectron2    .pkl                stem.conv1.*, res2.0.conv1.norm.* and so on, NumPy arrays
    safetensors   .safetensors        torchvision's, and how images are to be prepared
    onnx          .onnx               images (batch, C, S, S) → features (batch, D), for any batch

All hold the backbone only, in float32.

B batch · S side of a view · D features · C channels
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from fastmoco.backbones.description import RECORD
from fastmoco.backbones.detectron2 import NAME, detectron2_name
from fastmoco.backbones.onnx_file import load_onnx, write_onnx
from fastmoco.backbones.read import LoadedBackbone, read_backbone, record
from fastmoco.model.family import COUNTERS
from fastmoco.model.resnet import SHAPES, set_cifar_stem
from fastmoco.registry import EXPORT_TARGETS, TIMM_PREFIX
from fastmoco.run.sealed import sealed_bytes
from pipelines.errors import BackendMissingError
from pipelines.registry import load

State = dict[str, Tensor]
Model = Callable[[Tensor], Tensor]  # (B, C, S, S) → (B, D)

_LINCLS = "module.encoder_q."
_CLASSIFIER = ["fc.bias", "fc.weight"]
_GROUPS_AND_WIDTH = {"torchvision": ("groups", "width_per_group"), "timm": ("cardinality", "base_width")}


class Format(NamedTuple):
    """How a library's file is made and read back.

    write                (backbone, name of the file) → its bytes
    load                 (backbone, path) → the model that the library makes of it, and who that was, for people
    prefix               of the names in `registry.FAMILIES` that the library builds as well as our ResNets
    only_resnets, only_width_1, only_imagenet_stem, only_by_name, only_whole, only_rgb   what the library builds: no
                         other backbones, no other widths, no other stem, none that torchvision has no name for, none
                         without a part of the stem, none for other channels than three
    """

    write: Callable[[LoadedBackbone, str], bytes]
    load: Callable[[LoadedBackbone, Path], tuple[Model, str]]
    prefix: str = ""
    only_resnets: bool = True
    only_width_1: bool = True
    only_imagenet_stem: bool = False
    only_by_name: bool = False
    only_whole: bool = True
    only_rgb: bool = True

    def refusal(self, backbone: LoadedBackbone) -> str:
        """Of what kind this backbone is that the library does not build; empty where it builds it."""
        if self.prefix and backbone.arch.startswith(self.prefix):
            return ""
        if self.only_resnets and backbone.arch not in SHAPES:
            return backbone.arch
        if self.only_width_1 and backbone.width != 1:
            return f"{backbone.arch} with width {backbone.width:g}"
        if self.only_imagenet_stem and backbone.stem == "cifar":
            return f"{backbone.arch} with the CIFAR stem"
        if self.only_rgb and backbone.channels != 3:
            return f"{backbone.arch} for images of {backbone.channels} channels"
        if self.only_whole and backbone.without:
            return f"{backbone.arch} without {' and '.join(backbone.without)} before layer1"
        if self.only_by_name and not _named(backbone.arch):
            return f"{backbone.arch}, for which torchvision has no name"
        return ""


def _state(backbone: LoadedBackbone) -> State:
    """Its tensors, with num_batches_tracked counted as torch's batch norm would have."""
    state = dict(backbone.module.state_dict())
    return {n: tensor + backbone.forwards if n.endswith(COUNTERS) else tensor for n, tensor in state.items()}


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


def model_in(library: str, arch: str, channels: int = 3) -> nn.Module:
    """torchvision's or timm's own model of an architecture: classifier, ImageNet stem, random weights.

    channels  of the images; torchvision has 3 only
    """
    name, options = call_in(library, arch)
    if library == "torchvision":
        return torchvision.models.get_model(name, **options)
    import timm

    return timm.create_model(name, in_chans=channels, **options)


def _filled(library: str, backbone: LoadedBackbone, state: State) -> Model:
    """The library's model with these weights; only its classifier may be missing."""
    with torch.device("meta"):  # without weights of its own: whatever the file lacks, but for fc, cannot be computed
        model = model_in(library, backbone.arch, backbone.channels)
        if backbone.stem == "cifar":
            set_cifar_stem(model)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert sorted(missing) == _CLASSIFIER, missing
    assert unexpected == [], unexpected
    model.fc = nn.Identity()
    return model.eval()


def _created(backbone: LoadedBackbone, path: Path) -> Model:
    """timm's model with the file as its checkpoint_path, all tensors of which must be there."""
    import timm

    name = path.name.lower()
    suffix = (
        ".safetensors" if ".safetensors" in name else ".pth"
    )  # timm goes by the suffix, which a temporary name lacks
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder, "backbone" + suffix)
        try:
            named.symlink_to(path.absolute())
        except OSError:  # Windows may not allow it
            shutil.copyfile(path, named)
        model = timm.create_model(
            backbone.arch.removeprefix(TIMM_PREFIX),
            checkpoint_path=str(named),
            num_classes=0,
            in_chans=backbone.channels,
        )
    return model.eval()


def _load_torchvision(backbone: LoadedBackbone, path: Path) -> tuple[Model, str]:
    return _filled("torchvision", backbone, _read_state(path)), _version("torchvision")


def loads_whole(backbone: LoadedBackbone) -> bool:
    """Whether `timm.create_model(NAME, checkpoint_path=FILE, num_classes=0)` is the backbone: it has a name for it."""
    return backbone.arch.startswith(TIMM_PREFIX) or (_named(backbone.arch) and backbone.stem != "cifar")


def _load_timm(backbone: LoadedBackbone, path: Path) -> tuple[Model, str]:
    if importlib.util.find_spec("timm") is None:
        if backbone.channels != 3:
            raise BackendMissingError(
                f"a backbone for images of {backbone.channels} channels can be verified with timm only, which is not "
                "installed: pip install timm"
            )
        return _filled("torchvision", backbone, _read_state(path)), "torchvision (timm is not installed)"
    if loads_whole(backbone):
        return _created(backbone, path), f"{_version('timm')}, timm.create_model"
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


def _write_detectron2(backbone: LoadedBackbone, name: str) -> bytes:
    """What detectron2's checkpointer takes for a model of other hands: a pickle of a dict of NumPy arrays.

    In protocol 3 and under NumPy's older module name, the file loads with every NumPy since 1.17.
    """
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in _state(backbone).items()}
    content = {"model": arrays, "__author__": "fastmoco", "matching_heuristics": True}
    return pickle.dumps(content, protocol=3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)


def _load_detectron2(backbone: LoadedBackbone, path: Path) -> tuple[Model, str]:
    """The file's structure, and its arrays under torchvision's names again."""
    content = pickle.loads(path.read_bytes())  # our own bytes of a moment ago
    assert content["matching_heuristics"] is True
    assert content["__author__"]
    arrays = content["model"]
    assert all(NAME.fullmatch(name) for name in arrays), sorted(arrays)
    back = {detectron2_name(name): name for name in _state(backbone)}
    state = {back[name]: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    return _filled("torchvision", backbone, state), f"{_version('torchvision')}; detectron2 was not run"


TORCHVISION = Format(_write_state, _load_torchvision)
TIMM = Format(_write_state, _load_timm, prefix=TIMM_PREFIX, only_rgb=False)
DETECTRON2 = Format(_write_detectron2, _load_detectron2, only_imagenet_stem=True)
LINCLS = Format(_write_lincls, _load_lincls, only_imagenet_stem=True, only_by_name=True)
SAFETENSORS = Format(_write_state, _load_safetensors, only_resnets=False, only_width_1=False, only_rgb=False)
ONNX = Format(write_onnx, load_onnx, only_resnets=False, only_width_1=False, only_whole=False, only_rgb=False)


def format_of(target: str) -> Format:
    """The format of a key of `fastmoco.registry.EXPORT_TARGETS`."""
    return load(EXPORT_TARGETS[target].format)
