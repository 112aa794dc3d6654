"""Names of the tensors of a ResNet in files of other libraries, as torchvision has them.

    torchvision    conv1, bn1, layer1.0.conv1, layer2.0.downsample.0; most trainers, timm, mmpretrain. ResNets written
                   for CIFAR say `shortcut` for `downsample`
    children       the same modules by their number in a Sequential: 0, 1, 4.0.conv1, 5.0.downsample.0. Which number is
                   which follows from their order, since some leave the pooling out, and some the ReLU
    detectron2     stem.conv1, stem.conv1.norm, res2.0.conv1, res3.0.shortcut
    transformers   embedder.embedder.convolution, encoder.stages.0.layers.0.layer.0.convolution

Each may stand below any prefix, such as module.encoder_q.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fastmoco.model.family import Layout

# Wrappers put their names between those of the modules: torch.compile, FSDP, activation checkpointing, Lightning.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module"}
_MOST = 64  # are looked at, which bounds the time that a file can cost


class NamedResNet(NamedTuple):
    """What is named like a ResNet.

    prefix   of its names, such as "module.encoder_q."
    names    below it, torchvision's to those in the file
    without  what it leaves out between its first batch norm and layer1: relu, maxpool, neither
    """

    prefix: str
    names: dict[str, str]
    without: tuple[str, ...] = ()


def resnets(names: Iterable[str]) -> list[NamedResNet]:
    """Up to 64 ResNets, whole or not, in the order of the file."""
    unwrapped: dict[str, str] = {}
    for name in names:
        unwrapped.setdefault(".".join(part for part in name.split(".") if part not in _WRAPPERS), name)
    found: dict[str, NamedResNet] = {}
    for name in unwrapped:
        for anchor, convention in _CONVENTIONS:
            match = anchor.fullmatch(name)
            prefix = (match[1] or "") if match else None
            if prefix is None or prefix in found or len(found) == _MOST:
                continue
            below = {n.removeprefix(prefix): original for n, original in unwrapped.items() if n.startswith(prefix)}
            rename = convention(below)
            without = _left_out(below) if convention is _children else ()
            found[prefix] = NamedResNet(prefix, {rename(n): original for n, original in below.items()}, without)
    return list(found.values())


def like(names: Iterable[str], layout: Layout) -> list[NamedResNet]:
    """Up to 64 backbones of this layout by its own names, whole or not, in the order of the file.

    Left out are its classifier and whatever does not begin with the name of one of its modules, such as other heads.
    """
    unwrapped: dict[str, str] = {}
    for name in names:
        unwrapped.setdefault(".".join(part for part in name.split(".") if part not in _WRAPPERS), name)
    first = next(iter(layout.shapes))
    own = {name.partition(".")[0] for name in layout.shapes}
    prefixes = [name.removesuffix(first) for name in unwrapped if f".{name}".endswith(f".{first}")][:_MOST]
    found = []
    for prefix in prefixes:
        below = {n.removeprefix(prefix): original for n, original in unwrapped.items() if n.startswith(prefix)}
        parts = {n: o for n, o in below.items() if n.partition(".")[0] in own and not n.startswith(layout.head)}
        found.append(NamedResNet(prefix, parts))
    return found


def _torchvision(name: str) -> str:
    return re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name)


def _children(names: Iterable[str]) -> Callable[[str], str]:
    """Children with blocks are the stages; before them are the convolution and its batch norm, after them fc."""
    parts: dict[str, set[str]] = {}
    for name in names:
        number, _, rest = name.partition(".")
        if number.isdecimal():
            parts.setdefault(number, set()).add(rest)
    numbers = sorted(parts, key=int)
    stages = [number for number in numbers if "0.conv1.weight" in parts[number]]
    called = {number: f"layer{stage}" for stage, number in enumerate(stages, start=1)}
    before = [number for number in numbers if int(number) < int(stages[0])]
    norms = [number for number in before if "running_mean" in parts[number]]
    convolutions = [number for number in before if number not in norms]
    for kind, of_kind in (("conv1", convolutions), ("bn1", norms)):
        several = len(of_kind) > 1  # a deep stem, as timm names it
        called |= {number: f"{kind}.{i}" if several else kind for i, number in enumerate(of_kind)}
    called |= {number: "fc" for number in numbers if int(number) > int(stages[-1])}

    def rename(name: str) -> str:
        number, _, rest = name.partition(".")
        return _torchvision(f"{called.get(number, number)}.{rest}")

    return rename


def _left_out(names: Iterable[str]) -> tuple[str, ...]:
    """From the numbers that are free before the first stage: relu and maxpool have no tensors, but a number each."""
    names = list(names)
    stages = [int(name.partition(".")[0]) for name in names if re.fullmatch(r"\d+\.0\.conv1\.weight", name)]
    first = min(stages)
    before = [int(found[1]) for name in names if (found := re.match(r"(\d+)\.", name)) and int(found[1]) < first]
    free = first - max(before, default=-1) - 1
    return ("relu", "maxpool") if free == 0 else ("maxpool",) if free == 1 else ()


def _detectron2(name: str) -> str:
    """The inverse of `detectron2.detectron2_name`: res2.0.conv2.norm.weight → layer1.0.bn2.weight."""
    name = re.sub(r"^res(\d+)\.", lambda stage: f"layer{int(stage[1]) - 1}.", name.removeprefix("stem."))
    name = re.sub(r"\bconv(\d)\.norm\.", r"bn\1.", name)
    return name.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.weight", ".downsample.0.weight")


def _transformers(name: str) -> str:
    name = name.replace("embedder.embedder.convolution.", "conv1.").replace("embedder.embedder.normalization.", "bn1.")
    name = re.sub(r"^encoder\.stages\.(\d+)\.layers\.", lambda stage: f"layer{int(stage[1]) + 1}.", name)
    name = name.replace(".shortcut.convolution.", ".downsample.0.").replace(
        ".shortcut.normalization.", ".downsample.1."
    )
    name = re.sub(r"\.layer\.(\d+)\.convolution\.", lambda layer: f".conv{int(layer[1]) + 1}.", name)
    return re.sub(r"\.layer\.(\d+)\.normalization\.", lambda layer: f".bn{int(layer[1]) + 1}.", name)


# The name that gives each convention away, with the prefix before it; and names below it → how one is renamed.
_CONVENTIONS: tuple[tuple[re.Pattern[str], Callable[[Iterable[str]], Callable[[str], str]]], ...] = (
    (re.compile(r"(.*\.)?layer1\.0\.conv1\.weight"), lambda _: _torchvision),
    (re.compile(r"(.*\.)?\d+\.0\.conv1\.weight"), _children),
    (re.compile(r"(.*\.)?res2\.0\.conv1\.weight"), lambda _: _detectron2),
    (re.compile(r"(.*\.)?encoder\.stages\.0\.layers\.0\.layer\.0\.convolution\.weight"), lambda _: _transformers),
)
