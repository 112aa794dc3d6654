"""The search for a backbone in a file of any trainer: everything that is named like a ResNet and is a whole one.

A file may hold several, such as an encoder and its moving average. Their prefixes tell which is which:

    first    encoder_q, base_encoder, online, query, student
    second   every other prefix
    last     encoder_k, momentum, teacher, target, ema, key, and what belongs to a loss

The same tensors under two names count once. Several different ones of the same rank are an error that lists them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco.backbones.naming import NamedResNet, like, resnets
from fastmoco.backbones.tensor_files import TensorFile
from fastmoco.errors import CheckpointError
from fastmoco.model.architectures import identify, named_family
from pipelines.data.decode import printable

_FIRST = {"q", "query", "online", "student", "base"}
_LAST = {"k", "key", "momentum", "teacher", "target", "ema", "averaged", "shadow", "loss"}
# Modules that a ResNet consists of, or that would change what it computes. All others are heads, which are left out.
_STRUCTURE = re.compile(r"((conv|bn|norm|layer)\d*|stem|attnpool|maxpool|avd|\d+)\.")
_IN_TIMM = ("a ConvNeXt", "a RegNet", "a ResNet of pre-activation blocks (ResNetV2)")
_OTHERS = {  # names that give other networks away
    r"(.*\.)?(patch_embed\.proj|patch_embedding|conv_proj|cls_token|class_token)(\..*|$)": "a vision transformer",
    r"(.*\.)?(stages|layers)\.0\.blocks\.0\.attn\..*": "a vision transformer with windows (Swin)",
    r"(.*\.)?(stages\.0\.blocks\.0\.conv_dw|downsample_layers\.0\.0)\..*": "a ConvNeXt",
    r"(.*\.)?stages\.0\.blocks\.0\.(conv1|norm1)\..*": "a ResNet of pre-activation blocks (ResNetV2)",
    r"(.*\.)?(trunk_output\.block1|s1\.b1)\..*": "a RegNet",
    r"(.*\.)?flat_param(_\d+)?": "flattened parameters of FSDP: save its full state dict",
}


class FoundBackbone(NamedTuple):
    """A whole backbone in a file.

    prefix             of its names in the file, without the last dot; empty for bare names
    backbone, head     torchvision's names → those in the file; of the head without `fc.`
    arch, stem, width  as `architectures.identify` says
    others             prefixes of the other backbones in the file
    without            relu and maxpool, if the backbone leaves them out after its first batch norm
    is_encoder         whether `head` is a projection head rather than a classifier, as far as the names tell
    """

    prefix: str
    backbone: dict[str, str]
    head: dict[str, str]
    arch: str
    stem: str
    width: float
    others: tuple[str, ...]
    without: tuple[str, ...]
    is_encoder: bool


def find_backbone(
    file: TensorFile,
    origin: str,
    *,
    prefix: str | None = None,
    arch: str | None = None,
    own: Sequence[str] = (),
    option: str = "--prefix",
) -> FoundBackbone:
    """The backbone in a file, among several the one whose names have `prefix` in them, else the first by rank.

    prefix  whole parts of the names, such as encoder_k or teacher.backbone
    arch    restricts the search to the family of this architecture; ignored if unknown
    own     in place of a search, prefixes below which there is nothing but a backbone, of any family
    option  by which `prefix` is chosen, for messages

    Raises CheckpointError if there is none, or a choice that only `prefix` can make.
    """
    layout = None if (family := named_family(arch)) is None or arch is None else family.layout(arch)
    if own:
        named = [NamedResNet(known, _below(file, known)) for known in own]
    elif layout is not None:
        named = sorted(like(file.shapes, layout), key=lambda backbone: _rank(backbone.prefix))
    else:
        named = sorted(resnets(file.shapes), key=lambda resnet: _rank(resnet.prefix))
    if prefix is not None:
        wanted = f"{prefix.strip('.')}."
        chosen = [resnet for resnet in named if resnet.prefix == wanted.lstrip(".")]
        chosen = chosen or [resnet for resnet in named if f".{wanted}" in f".{resnet.prefix}"]
        if not chosen:
            there = _list([resnet.prefix for resnet in named])
            raise CheckpointError(f"{origin} has no backbone below {printable(prefix[:80])!r}, but below {there}")
        named = chosen
    whole, reasons = _identified(file, named, arch, filtered=not own and layout is None, bare=not own)
    if not whole and layout is not None and not named:
        raise CheckpointError(f"{origin} holds no {arch}: there is no {next(iter(layout.shapes))} in it")
    if not whole:
        raise CheckpointError(_nothing(file, origin, named, reasons))
    best = [found for found in whole if _rank(found.prefix) == _rank(whole[0].prefix)]
    different = [best[0], *(found for found in best[1:] if not _same(file, found, best[0]))]
    if len(different) > 1:
        raise CheckpointError(
            f"{origin} has several backbones, below {_list([found.prefix for found in different])}: choose one with "
            f"{option} {printable(different[0].prefix or different[1].prefix)}"
        )
    rest = [found.prefix for found in whole if found not in best]
    return best[0]._replace(others=tuple(rest))


def _below(file: TensorFile, prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in file.shapes if name.startswith(prefix)}


def _rank(prefix: str) -> int:
    words = set(re.split(r"[^a-z0-9]+", prefix.lower()))
    return 2 if words & _LAST else 0 if words & _FIRST else 1


def _identified(
    file: TensorFile, named: list[NamedResNet], arch: str | None, *, filtered: bool, bare: bool
) -> tuple[list[FoundBackbone], list[str]]:
    """Those that are whole, and for each of the others what it is not.

    filtered  whether the names are also those of heads
    bare      whether the file is of others, with its head where it likes
    """
    whole, reasons = [], []
    for prefix, names, without in named:
        parts = {n: original for n, original in names.items() if not filtered or _STRUCTURE.match(n)}
        head = {n.removeprefix("fc."): original for n, original in names.items() if n.startswith("fc.")}
        if not bare:
            head = _below(file, prefix.removesuffix("backbone.") + "head.") if prefix else {}
        try:
            actual = identify({name: file.shapes[original] for name, original in parts.items()}, arch)
        except ValueError as error:
            reasons.append(str(error))
            continue
        is_encoder = not bare or _rank(prefix) != 1
        if actual[1] == "cifar":
            without = tuple(name for name in without if name != "maxpool")  # which that stem never has
        whole.append(FoundBackbone(prefix.rstrip("."), parts, head, *actual, (), without, is_encoder))
    return whole, reasons


def _same(file: TensorFile, one: FoundBackbone, other: FoundBackbone) -> bool:
    """Whether two backbones are the same tensors, or equal ones."""
    if one.backbone.keys() != other.backbone.keys():
        return False
    pairs = [(one.backbone[name], other.backbone[name]) for name in one.backbone]
    if any(file.shapes[a] != file.shapes[b] for a, b in pairs):
        return False
    apart = [(a, b) for a, b in pairs if file.place(a) != file.place(b)]
    return all(_equal(*file.load(pair).values()) for pair in apart)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _list(prefixes: list[str]) -> str:
    """`module.encoder_q and module.encoder_k`; at most eight."""
    shown = [printable(prefix.rstrip(".")[:80]) or "no prefix" for prefix in prefixes[:8]]
    return " and ".join(shown) + f" and {len(prefixes) - 8} more" * (len(prefixes) > 8) if shown else "no other"


def _nothing(file: TensorFile, origin: str, named: list[NamedResNet], reasons: list[str]) -> str:
    """Why there is no backbone in a file, in one line."""
    if named:
        where = named[0].prefix.rstrip(".")
        below = f" below {printable(where[:80])}" if where else ""
        return f"{origin} holds no backbone that fastmoco knows{below}: {reasons[0]}"
    if file.whole_models:
        return (
            f"{origin} holds a whole model ({printable(file.whole_models[0][:80])}), which is not loaded because it "
            "could run code: save its weights with torch.save(model.state_dict(), ...)"
        )
    for pattern, kind in _OTHERS.items():
        if any(re.fullmatch(pattern, name) for name in file.shapes):
            named_as = " without being named (arch timm/NAME)" if kind in _IN_TIMM else ""
            return f"{origin} holds {kind}, and fastmoco has ResNets, ResNeXts and wide ResNets only{named_as}"
    some = ", ".join(printable(name)[:60] for name in list(file.shapes)[:3])
    return (
        f"{origin} holds no ResNet: expected names such as conv1.weight and layer1.0.conv1.weight below any prefix, "
        f"found {some or 'no tensors'}"
    )
