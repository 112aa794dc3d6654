"""Backbones from files: our runs and checkpoints, the authors' checkpoints, torchvision's state dicts.

    what the path is               which tensors are read
    the folder of a run            those of its newest checkpoint that verifies, else of its backbone.safetensors
    step-….safetensors             model/query.backbone.*, after the file's SHA-256 has been checked
    any other safetensors file     bare names, as in a run's backbone.safetensors and in `fastmoco export`
    a file of torch.save           module.encoder_q.* (facebookresearch/moco), encoder_q.net.* (the authors' CIFAR
                                   demo), or bare names, with or without `module.` (torchvision, main_lincls.py)

The projection head or classifier, `fc.*`, is left out. Architecture, width and stem follow from the shapes of the
tensors. What a file holds is never executed: torch's files are read with `weights_only`, and whatever a file claims is
compared with its size before memory is spent on it.

B batch · S side of a view · D features
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastmoco.config import RunConfig
from fastmoco.errors import CheckpointError, ConfigError
from fastmoco.export.torch_files import PICKLE, ZIP, read_torch
from fastmoco.model.architectures import check_wanted, family, identify
from fastmoco.model.encoder import feature_dim
from fastmoco.model.family import COUNTERS
from fastmoco.run import checkpoint
from fastmoco.run.checkpoint_meta import CheckpointMeta
from fastmoco.run.directory import read_config
from pipelines.augment.presets import AUGMENTATIONS, CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD
from pipelines.data.decode import printable

RECORD = "fastmoco"  # under this name an exported file says how images were prepared

_CHECKPOINT_PREFIX = "model/query.backbone."
_PREFIXES = ("module.encoder_q.", "encoder_q.", "module.", "")
# The authors' CIFAR demo numbers the children of torchvision's ResNet, without the pooling that it leaves out.
_DEMO_NAMES = {"net.0.": "conv1.", "net.1.": "bn1."} | {f"net.{n + 2}.": f"layer{n}." for n in (1, 2, 3, 4)}
_DEMO_NAMES |= {"net.9.": "fc."}
_RUN_FIELDS = ("arch", "width", "stem", "crop_size", "aug", "data")


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone for use: evaluation mode, float32, on the CPU, of torchvision's classes alone.

    module       (B, 3, S, S) normalised images → (B, feature_dim)
    arch         a key of `registry.ARCHITECTURES`; stem and width as in `encoder.build_encoder`
    side         S in pixels that it was trained with, or the usual one of its stem
    mean, std    of each channel, of values from 0 to 1: with what images were normalised
    origin       where it is from, for people
    data         what it was trained on, as `--data` says it; None where the file does not tell
    """

    module: nn.Module
    arch: str
    stem: str
    width: float
    feature_dim: int
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    origin: str
    data: str | None


@dataclass(frozen=True)
class _Found:
    """What a file holds: tensors under bare names, and what it says of them; None where it says nothing."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: str = ""
    arch: str | None = None
    stem: str | None = None
    width: float | None = None
    side: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    data: str | None = None


def read_backbone(
    path: str | Path, *, arch: str | None = None, stem: str | None = None, side: int | None = None
) -> LoadedBackbone:
    """The backbone in a run directory, checkpoint or state dict; see the head of this file.

    arch, stem   what it has to be, where somebody knows
    side         S of the views to come, in place of the one it was trained with

    Raises CheckpointError where there is nothing, or something damaged, foreign or of another architecture, and
    ConfigError for a value that does not exist and a folder that is no run.
    """
    check_wanted(arch, stem, side)
    found = _read(Path(path).expanduser())
    tensors, origin = found.tensors, found.origin
    try:
        actual = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()}, found.arch)
    except ValueError as error:
        raise CheckpointError(f"{origin} holds no backbone that fastmoco knows: {error}") from None
    for what, said, other in zip(("arch", "stem", "width"), (found.arch, found.stem, found.width), actual, strict=True):
        if said not in (None, other):
            raise CheckpointError(f"{origin} contradicts itself: its {what} is said to be {said}, its tensors: {other}")
    for what, wanted, other in zip(("arch", "stem"), (arch, stem), actual, strict=False):
        if wanted not in (None, other):
            raise CheckpointError(f"{origin} has the {what} {other}, and {wanted} was requested: choose another file")
    usual = _usual(actual[1])
    return LoadedBackbone(
        module=_module(tensors, *actual, origin),
        arch=actual[0],
        stem=actual[1],
        width=actual[2],
        feature_dim=feature_dim(actual[0], actual[2]),
        side=side or found.side or usual[0],
        mean=found.mean or usual[1],
        std=found.std or usual[2],
        origin=origin,
        data=found.data,
    )


def _usual(stem: str) -> tuple[int, tuple[float, float, float], tuple[float, float, float]]:
    """Side, mean and std where a file says nothing: of the CIFAR demo, or of ImageNet."""
    return (32, CIFAR_MEAN, CIFAR_STD) if stem == "cifar" else (224, IMAGENET_MEAN, IMAGENET_STD)


def _module(tensors: Mapping[str, Tensor], arch: str, stem: str, width: float, origin: str) -> nn.Module:
    """The model around these tensors, whose shapes are known to be right."""
    with torch.device("meta"):  # without weights of its own
        module = family(arch).build(arch, width=width, stem=stem)
    state: dict[str, Tensor] = {}
    for name in module.state_dict():
        if name.endswith(COUNTERS):
            state[name] = tensors.get(name, torch.zeros(())).to(torch.int64)
            continue
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"{origin} holds {name} as {tensors[name].dtype}, expected floating point numbers")
        state[name] = tensors[name].to(torch.float32, copy=True).contiguous()
        if not state[name].isfinite().all():
            raise CheckpointError(f"{origin} has values in {name} that are not finite: take an earlier checkpoint")
    module.load_state_dict(state, assign=True)
    return module.eval()


# ---- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Found:
    if path.is_dir():
        return _read_run(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no file or folder {printable(str(path))}: expected a run or a checkpoint of a backbone"
        )
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{printable(str(path))} cannot be read ({error.strerror or error})") from error
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith((ZIP, PICKLE)):
        return _read_torch(path)
    raise CheckpointError(
        f"{printable(str(path))} begins with {head!r}, expected a safetensors file or one of torch.save"
    )


def _read_run(path: Path) -> _Found:
    """The newest checkpoint: unlike backbone.safetensors it has a hash."""
    config = _from_config(read_config(path).flat(), str(path))
    newest, warnings = checkpoint.newest(path / "checkpoints")
    if newest is not None:
        found = _read_safetensors(newest)
        return replace(found, origin=f"{found.origin} ({len(warnings)} newer damaged)") if warnings else found
    if not (path / "backbone.safetensors").is_file():
        raise CheckpointError(f"the run in {printable(str(path))} has no checkpoint and no backbone.safetensors yet")
    found = _read_safetensors(path / "backbone.safetensors")
    return replace(config, tensors=found.tensors, origin=found.origin)


def _read_safetensors(path: Path) -> _Found:
    origin = printable(str(path))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            said, prefix = _Found(), ""
            if "meta" in metadata:
                config = CheckpointMeta.of(path, checkpoint.verify(path)).config
                said, prefix = _from_config(config.flat(), origin), _CHECKPOINT_PREFIX
            elif RECORD in metadata:
                said = from_record(metadata[RECORD], origin)
            elif path.name == "backbone.safetensors" and (path.parent / "config.json").is_file():
                said = _from_config(read_config(path.parent).flat(), origin)
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{origin} cannot be read ({reason}): it is damaged, or no safetensors file") from error
    return replace(said, tensors=_without_head(tensors), origin=origin)


def _read_torch(path: Path) -> _Found:
    origin, file = printable(str(path)), read_torch(path)
    names = tuple(file.tensors)
    prefix = next((p for p in _PREFIXES if p + "conv1.weight" in names or p + "net.0.weight" in names), None)
    if prefix is None:
        some = ", ".join(printable(name)[:60] for name in names[:3]) or "none"
        raise CheckpointError(
            f"{origin} holds no ResNet, neither of MoCo nor bare: expected module.encoder_q.conv1.weight or "
            f"conv1.weight among the names of its tensors, found {some}"
        )
    said = from_record(file.texts[RECORD], origin) if RECORD in file.texts else _Found()
    kept = {
        _bare(name.removeprefix(prefix)): tensor for name, tensor in file.tensors.items() if name.startswith(prefix)
    }
    return replace(said, tensors=_without_head(kept), origin=origin, arch=file.texts.get("arch"))


def _bare(name: str) -> str:
    part = next((demo for demo in _DEMO_NAMES if name.startswith(demo)), None)
    return name if part is None else _DEMO_NAMES[part] + name.removeprefix(part)


def _without_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}


# ---- what is said beside the tensors ---------------------------------------------------------------------------------


def record(backbone: LoadedBackbone) -> str:
    """What a file has to say for `read_backbone` to prepare images in the same way, as one string of JSON."""
    said = {"side": backbone.side, "mean": backbone.mean, "std": backbone.std, "data": backbone.data}
    return json.dumps(said)


def from_record(text: str, origin: str) -> _Found:
    """The inverse of `record`. Raises CheckpointError."""
    try:
        said = json.loads(text)
        side, mean, std, data = said["side"], _three(said["mean"]), _three(said["std"]), said["data"]
        if not (type(side) is int and 8 <= side <= 16384 and min(std) > 0 and isinstance(data, str | None)):
            raise ValueError(text)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{origin} says how images were prepared, but not readably: {text[:80]!a}") from None
    return _Found(side=side, mean=mean, std=std, data=data)


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    if not math.isfinite(red + green + blue):
        raise ValueError(values)
    return red, green, blue


def _from_config(flat: Mapping[str, Any], origin: str) -> _Found:
    """From the settings of a run, resolved or from a checkpoint."""
    try:
        config = RunConfig().replace(**{name: flat[name] for name in _RUN_FIELDS if name in flat})
    except ConfigError as error:
        raise CheckpointError(f"{origin} was trained with settings that do not exist here: {error}") from None
    augmentation = AUGMENTATIONS.get(config.augment.aug or "")
    return _Found(
        arch=config.model.arch,
        stem=None if config.model.stem == "auto" else config.model.stem,
        width=config.model.width,
        side=config.augment.crop_size,
        mean=augmentation and augmentation.mean,
        std=augmentation and augmentation.std,
        data=config.data.data,
    )
