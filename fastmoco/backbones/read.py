"""Backbones from files: our runs and checkpoints, checkpoints of other trainers, state dicts.

    what the path is               which tensors are read
    the folder of a run            those of its newest checkpoint that verifies, else of its backbone.safetensors
    step-….safetensors             model/query.backbone.*, after the file's SHA-256 has been checked
    backbone.safetensors, or of    bare names; their SHA-256 of the content is checked
    `fastmoco export`
    any other safetensors file,    a ResNet below any prefix, in any dict, by any of the names in `backbones.naming`;
    or one of torch.save           `backbones.find_backbone` says which one of several

Heads and classifiers are left out. Architecture, width and stem follow from the shapes of the tensors. What a file
holds is never executed (`backbones.pickles`), and whatever it claims is compared with its size before memory is spent
on it.

B batch · S side of a view · D features · C channels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmoco.backbones.description import Colour, Description, to_record
from fastmoco.backbones.find_backbone import FoundBackbone, find_backbone
from fastmoco.backbones.sources import Source, open_source
from fastmoco.errors import CheckpointError
from fastmoco.model.architectures import check_available, check_wanted, family, is_named, named_family
from fastmoco.model.encoder import feature_dim
from fastmoco.model.family import COUNTERS
from fastmoco.model.init_weights import InitWeights
from fastmoco.model.input_channels import first_convolution, set_channels
from fastmoco.run.sealed import content_sha256
from pipelines.augment.presets import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD
from pipelines.data.decode import printable

_TRAINED = ("", "model.query.backbone")  # the encoder whose steps a run counts, in a file of ours


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone for use: evaluation mode, float32, on the CPU, of torchvision's classes alone.

    module       (B, C, S, S) normalised images → (B, feature_dim)
    arch         a key of `registry.ARCHITECTURES`; stem and width as in `encoder.build_encoder`
    side         S in pixels that it was trained with, or the usual one of its stem
    mean, std    of each channel, of values from 0 to 1: with what images were normalised
    origin       where it is from, for people
    data         what it was trained on, as `--data` says it; None where the file does not tell
    without      parts of the stem that its network leaves out, of relu and maxpool; `module` has an identity there
    forwards     batches that its batch norm has seen in training beyond what its num_batches_tracked say
    head         the projection head of its encoder, by the names below fc. or head.; empty where there is none
    """

    module: nn.Module
    arch: str
    stem: str
    width: float
    feature_dim: int
    side: int
    mean: Colour
    std: Colour
    origin: str
    data: str | None
    without: tuple[str, ...] = ()
    forwards: int = 0
    head: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """C of the images."""
        return len(self.mean)


def read_backbone(
    path: str | Path,
    *,
    arch: str | None = None,
    stem: str | None = None,
    side: int | None = None,
    prefix: str | None = None,
    option: str = "--prefix",
) -> LoadedBackbone:
    """The backbone in a run directory, checkpoint or state dict; see the head of this file.

    arch, stem   what it has to be, where somebody knows
    side         S of the views to come, in place of the one it was trained with
    prefix       of several backbones, the one with these parts in its names: encoder_k, teacher
    option       how a prefix is chosen, for messages

    Raises CheckpointError where there is nothing, or something damaged, foreign or of another architecture, and
    ConfigError for a value that does not exist and a folder that is no run.
    """
    check_wanted(arch, stem, side)
    source = open_source(Path(path).expanduser())
    said, origin = source.said, source.origin
    known = said.arch or (arch if is_named(arch) else None)  # shapes do not tell which model of timm it is
    check_available(known)
    try:
        found = find_backbone(source.file, origin, prefix=prefix, arch=known, own=source.own, option=option)
        tensors, head = _load(source, found.backbone), _load(source, found.head if found.is_encoder else {})
    except CheckpointError:
        raise
    except Exception as error:  # of values that are not where an untrusted file says
        reason = str(error) if type(error) is ValueError else f"it is damaged ({str(error)[:120]})"
        raise CheckpointError(f"{origin} cannot be used: {printable(reason)}") from error
    actual = found.arch, found.stem, found.width
    said = said if prefix is None or source.own else Description()  # what it says is not of the other backbone
    for what, claimed, other in zip(("arch", "stem", "width"), (said.arch, said.stem, said.width), actual, strict=True):
        if claimed not in (None, other):
            raise CheckpointError(
                f"{origin} contradicts itself: its {what} is said to be {claimed}, its tensors: {other}"
            )
    for what, wanted, other in zip(("arch", "stem"), (arch, stem), actual, strict=False):
        if wanted not in (None, other):
            raise CheckpointError(f"{origin} has the {what} {other}, and {wanted} was requested: choose another file")
    usual = _usual(found.arch, found.stem)
    module = _module(tensors, *actual, origin)
    channels = first_convolution(module)[1].in_channels
    if said.mean is not None and len(said.mean) != channels:
        raise CheckpointError(
            f"{origin} contradicts itself: its images are said to have {len(said.mean)} channels, its tensors: "
            f"{channels}"
        )
    for name in found.without:
        setattr(module, name, nn.Identity())
    return LoadedBackbone(
        module=module,
        arch=found.arch,
        stem=found.stem,
        width=found.width,
        feature_dim=feature_dim(found.arch, found.width),
        side=side or said.side or usual[0],
        mean=said.mean or _of_channels(usual[1], channels),
        std=said.std or _of_channels(usual[2], channels),
        origin=origin + _which(source, found, prefix),
        data=said.data,
        without=found.without,
        forwards=said.forwards if found.prefix in _TRAINED else 0,
        head=head,
    )


def read_init(path: str, prefix: str | None = None, arch: str | None = None) -> InitWeights:
    """The weights that `--init` names, with the head of MoCo's encoder if there is one. Raises as `read_backbone`.

    arch  of --arch, which says what a file of timm's is; others are found by their shapes, and compared by `initial`
    """
    loaded = read_backbone(path, arch=arch if is_named(arch) else None, prefix=prefix, option="--init-prefix")
    if loaded.without:
        raise CheckpointError(
            f"{loaded.origin} is of a network without {' and '.join(loaded.without)} before layer1, and training has "
            "both: choose another file"
        )
    backbone = loaded.module.state_dict()
    linear = {"weight", "bias"}  # of MoCo v1, in which the head is one layer
    head = {f"0.{name}" if name in linear else name: tensor.float() for name, tensor in loaded.head.items()}
    sha256 = content_sha256(backbone | {f"head.{name}": tensor for name, tensor in head.items()})
    kind = loaded.arch, loaded.stem, loaded.width, loaded.channels
    return InitWeights(*kind, backbone, head, sha256, loaded.origin)


def record(backbone: LoadedBackbone) -> str:
    """What a file has to say for `read_backbone` to prepare images in the same way."""
    arch = backbone.arch if is_named(backbone.arch) else None
    return to_record(side=backbone.side, mean=backbone.mean, std=backbone.std, data=backbone.data, arch=arch)


def _load(source: Source, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by torchvision's names."""
    loaded = source.file.load(names.values())
    return {name: loaded[original] for name, original in names.items()}


def _which(source: Source, found: FoundBackbone, prefix: str | None) -> str:
    """Which one of several backbones it is, and what it lacks; nothing for the query encoder of our own checkpoints."""
    said = []
    if prefix is not None or (found.others and not source.own):
        said.append(printable(found.prefix[:80]))
        said += ["not " + " or ".join(printable(other[:80]) for other in found.others[:3])] if found.others else []
    said += ["without " + " and ".join(found.without)] if found.without else []
    return f" ({', '.join(said)})" if said else ""


def _usual(arch: str, stem: str) -> tuple[int, Colour, Colour]:
    """Side, mean and std where a file says nothing: those of timm for the model, of the CIFAR demo, or of ImageNet."""
    named = named_family(arch)
    if named is not None and (settings := named.settings(arch)) is not None:
        return settings.side, settings.mean, settings.std
    return (32, CIFAR_MEAN, CIFAR_STD) if stem == "cifar" else (224, IMAGENET_MEAN, IMAGENET_STD)


def _of_channels(values: Colour, channels: int) -> Colour:
    """The mean over the colours for other channels, whose own are not known."""
    return values if channels == 3 else (round(sum(values) / 3, 4),) * channels


def _module(tensors: Mapping[str, Tensor], arch: str, stem: str, width: float, origin: str) -> nn.Module:
    """The model around these tensors, whose shapes are known to be right."""
    with torch.device("meta"):  # without weights of its own
        module = family(arch).build(arch, width=width, stem=stem)
        name, convolution = first_convolution(module)
        set_channels(module, tensors[f"{name}.weight"].shape[1] * convolution.groups)
    state: dict[str, Tensor] = {}
    for name, own in module.state_dict().items():
        if name.endswith(COUNTERS):
            state[name] = tensors.get(name, torch.zeros(())).to(torch.int64)
            continue
        if not own.is_floating_point():  # a table of indices, of a model of others
            state[name] = tensors[name].to(own.dtype, copy=True)
            continue
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"{origin} holds {name} as {tensors[name].dtype}, expected floating point numbers")
        state[name] = tensors[name].to(torch.float32, copy=True).contiguous()
        if not state[name].isfinite().all():
            raise CheckpointError(f"{origin} has values in {name} that are not finite: take an earlier checkpoint")
    module.load_state_dict(state, assign=True)
    return module.eval()
